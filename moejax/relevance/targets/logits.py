"""Targets made of logits at one position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.errors import PromptError
from moejax.lm import LM
from moejax.relevance.seeds import BEST
from moejax.relevance.targets.base import (
    Target,
    TargetTerms,
    TokenName,
    checked_position,
    register_target,
    token_id,
)


@register_target("argmax")
@dataclass(frozen=True)
class Argmax(Target):
    """The logit of the most likely next token, at the last position unless another is given."""

    position: int = -1

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        return prompt, [TargetTerms(checked_position(self.position, len(prompt)), ((BEST, 1.0),))]


@register_target("token")
@dataclass(frozen=True)
class Token(Target):
    """The logit of one token, named by its text (exactly one token) or id."""

    token: TokenName
    position: int = -1

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        position = checked_position(self.position, len(prompt))
        return prompt, [TargetTerms(position, ((token_id(lm, self.token), 1.0),))]


@register_target("contrast")
@dataclass(frozen=True)
class Contrast(Target):
    """The logit of one token minus the logit of another; what raises all logits alike does not change it.

    ``other`` may be several tokens: their average logit, weighted by their probabilities.
    """

    token: TokenName
    other: TokenName | Sequence[TokenName]
    position: int = -1

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        position, token = checked_position(self.position, len(prompt)), token_id(lm, self.token)
        given = np.asarray(self.other, object)
        others = [token_id(lm, other) for other in given.ravel()]
        if token in others or not others:
            raise PromptError(f"a contrast needs two tokens; {self.token!r} stands on both sides, or nothing on one.")
        if given.ndim:
            # each token counts once, however often it is named
            return prompt, [TargetTerms(position, ((token, 1.0),), rivals=tuple(dict.fromkeys(others)))]
        return prompt, [TargetTerms(position, ((token, 1.0), (others[0], -1.0)))]


@register_target("mean_contrast")
@dataclass(frozen=True)
class MeanContrast(Target):
    """The logit of one token minus the mean logit of all tokens."""

    token: TokenName
    position: int = -1

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        position = checked_position(self.position, len(prompt))
        return prompt, [TargetTerms(position, ((token_id(lm, self.token), 1.0),), mean=1.0)]


@register_target("log_probability")
@dataclass(frozen=True)
class LogProbability(Target):
    """The log-probability of one token, expanded at its logits: relevance adds up to ``z - sum p z``."""

    token: TokenName
    position: int = -1

    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        position = checked_position(self.position, len(prompt))
        return prompt, [TargetTerms(position, ((token_id(lm, self.token), 1.0),), expected=1.0)]
