"""Targets made of the tokens of an answer, all read from one forward pass over prompt and answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from moejax.errors import PromptError
from moejax.lm import LM
from moejax.relevance.targets.base import Target, TargetTerms, register_target
from moejax.relevance.targets.logits import Argmax


@register_target("continuation")
@dataclass(frozen=True)
class Continuation(Target):
    """Every token of a given answer: N targets from one forward pass over prompt and answer."""

    answer: str | Sequence[int]

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        answer = self.answer
        ids = lm.need_tokenizer().continuation(answer) if isinstance(answer, str) else list(answer)
        if not ids:
            raise PromptError("the answer is empty: there is no token to explain.")
        return _teacher_forced(prompt, lm.check(ids).tolist())


@register_target("generated")
@dataclass(frozen=True)
class Generated(Target):
    """Every token that the model itself generates, greedily."""

    max_new_tokens: int = 10

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        new = lm.generate_ids([prompt], max_new_tokens=self.max_new_tokens)[0]
        # if the model ends the text at once it generates nothing; explain the end token itself then
        return _teacher_forced(prompt, new) if new else Argmax().resolve(lm, prompt)


@register_target("role")
@dataclass(frozen=True)
class Role(Target):
    """Every token of a chat with a role, such as the assistant's ``"answer"`` or ``"reasoning"``."""

    role: str = "answer"

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        roles = getattr(prompt, "roles", None)
        if roles is None:
            raise PromptError("only a chat has roles: explain messages, or a moejax.Chat.")
        places = [place for place, role in enumerate(roles) if role == self.role and place]
        if not places:
            there = ", ".join(dict.fromkeys(roles))
            raise PromptError(f"no token of this chat has the role {self.role!r}; there are {there}.")
        return prompt, [TargetTerms(place - 1, ((prompt[place], 1.0),)) for place in places]


@register_target("span")
@dataclass(frozen=True)
class Span(Target):
    """The log-probability of a whole answer: one target, the sum over its tokens (:class:`LogProbability`)."""

    answer: str | Sequence[int]
    joint = True

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        ids, targets = Continuation(self.answer).resolve(lm, prompt)
        return ids, [TargetTerms(target.position, target.terms, expected=1.0) for target in targets]


def _teacher_forced(prompt: list[int], answer: list[int]) -> tuple[list[int], list[TargetTerms]]:
    """Return prompt and answer without its last token, and the logit of each token of the answer as a target."""
    targets = [TargetTerms(len(prompt) - 1 + i, ((token, 1.0),)) for i, token in enumerate(answer)]
    return prompt + answer[:-1], targets
