"""What is explained: a logit, or a difference of logits, at a position."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moejax.errors import PromptError

if TYPE_CHECKING:
    from moejax.lm import LM

BEST = -1
"""Stands for the token with the largest logit, known only after the forward pass."""


@dataclass(frozen=True)
class Aim:
    """One target: the sum over ``terms`` of sign times logit, at ``position``.

    Attributes:
        position: index of the token whose successor is predicted, counted in the unpadded sequence.
        terms: pairs of token id (or :data:`BEST`) and sign.
    """

    position: int
    terms: tuple[tuple[int, float], ...]


class Target(ABC):
    """A question about a prompt. Resolves to the sequence to run and N aims in it."""

    @abstractmethod
    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[Aim]]:
        """The token ids of the forward pass (the prompt, perhaps continued) and the targets read from it.

        Raises:
            PromptError: a named token is several tokens, an id or a position is out of range.
        """


def _token_id(lm: "LM", token: str | int) -> int:
    if isinstance(token, str):
        return lm.need_tokenizer().token_id(token)
    return int(lm.check([token])[0])


def _position(position: int, length: int) -> int:
    if not -length <= position < length:
        raise PromptError(f"position {position} is outside the prompt of {length} tokens.")
    return position % length


@dataclass(frozen=True)
class Argmax(Target):
    """The logit of the most likely next token, at the last position unless another is given."""

    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[Aim]]:
        return prompt, [Aim(_position(self.position, len(prompt)), ((BEST, 1.0),))]


@dataclass(frozen=True)
class Token(Target):
    """The logit of one token, named by its text (exactly one token) or id."""

    token: str | int
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[Aim]]:
        return prompt, [Aim(_position(self.position, len(prompt)), ((_token_id(lm, self.token), 1.0),))]


@dataclass(frozen=True)
class Contrast(Target):
    """The logit of one token minus that of another; blind to what raises all logits alike."""

    token: str | int
    other: str | int
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[Aim]]:
        terms = ((_token_id(lm, self.token), 1.0), (_token_id(lm, self.other), -1.0))
        return prompt, [Aim(_position(self.position, len(prompt)), terms)]


@dataclass(frozen=True)
class Continuation(Target):
    """Every token of a given answer: N targets from one forward pass over prompt and answer."""

    answer: str | Sequence[int]

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[Aim]]:
        answer = self.answer
        ids = lm.need_tokenizer().encode(answer, special=False) if isinstance(answer, str) else list(answer)
        return _teacher_forced(prompt, lm.check(ids).tolist())


@dataclass(frozen=True)
class Generated(Target):
    """Every token that the model itself generates, greedily."""

    max_new_tokens: int = 10

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[Aim]]:
        new = lm.generate_ids([prompt], max_new_tokens=self.max_new_tokens)[0]
        # an immediate end of text generates nothing; the end token itself is then what there is to explain
        return _teacher_forced(prompt, new) if new else Argmax().resolve(lm, prompt)


def _teacher_forced(prompt: list[int], answer: list[int]) -> tuple[list[int], list[Aim]]:
    aims = [Aim(len(prompt) - 1 + i, ((token, 1.0),)) for i, token in enumerate(answer)]
    return prompt + answer[:-1], aims
