"""The base class of targets, the terms that targets resolve to, and targets by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeVar, Union

import jax
import numpy as np
from jax.typing import DTypeLike

from moejax.errors import PromptError
from moejax.lm import LM
from moejax.registry import Registry
from moejax.relevance.seeds import LogitSeeds, Seeds

TokenName = str | SupportsIndex
"""A token's text or its id."""


@dataclass(frozen=True)
class TargetTerms:
    """One target: the sum over ``terms`` of sign times logit, at ``position``, less what the target is compared with.

    Attributes:
        position: index of the token whose successor is predicted, counted in the unpadded sequence.
        terms: pairs of an id and a sign. The id is a token's, :data:`BEST` for the most likely token, or an expert's
            for a router's choice.
        rivals: token ids; their logits' average, weighted by their probabilities, is subtracted.
        mean: factor of the average logit of all tokens, which is subtracted.
        expected: factor of the expected logit ``sum p z``, which is subtracted; 1 gives the log-probability's gradient.
    """

    position: int
    terms: tuple[tuple[int, float], ...]
    rivals: tuple[int, ...] = ()
    mean: float = 0.0
    expected: float = 0.0


TargetLike = Union["Target", TokenName]
"""A target, or a token's text or id, which stands for its logit at the last position."""


class Target(ABC):
    """A number to explain for a prompt. It resolves to the sequence to run and N lists of terms in it.

    A target of a new kind is a frozen dataclass in one file: it overrides :meth:`resolve` and, if it is no sum of
    logits, :meth:`seeds` and :meth:`label`. :func:`register_target` makes it known to the command line.
    """

    joint = False
    """True if the N parts are one target, their sum."""

    @abstractmethod
    def resolve(self, lm: LM, prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        """Return the token ids of the forward pass (the prompt, perhaps continued) and the terms of each target.

        Raises:
            PromptError: a named token is several tokens, or an id or a position is out of range.
        """

    def seeds(self, rows: list[list[TargetTerms]], dtype: DTypeLike) -> Seeds:
        """Return the terms of each sequence as arrays; sequences with fewer targets get empty targets behind them."""
        terms = max(len(target.terms) + len(target.rivals) for targets in rows for target in targets)
        count = max(map(len, rows))
        positions, ids = np.zeros((len(rows), count), np.int32), np.zeros((len(rows), count, terms), np.int32)
        signs, rivals = np.zeros(ids.shape, dtype), np.zeros(ids.shape, bool)
        mean, expected = np.zeros((2, *positions.shape), dtype)
        for row, targets in enumerate(rows):
            for n, target in enumerate(targets):
                positions[row, n] = target.position
                mean[row, n], expected[row, n] = target.mean, target.expected
                for j, (token, sign) in enumerate([*target.terms, *((token, 0.0) for token in target.rivals)]):
                    ids[row, n, j], signs[row, n, j] = token, sign
                    rivals[row, n, j] = j >= len(target.terms)
        # in one call and already in the device's dtypes: separate calls and conversions there take milliseconds
        arrays = jax.device_put((positions, ids, signs, rivals, mean, expected))
        return LogitSeeds(*arrays, dense=bool(mean.any() or expected.any()))

    def label(self, lm: LM, terms: TargetTerms, ids: np.ndarray) -> str:
        """Name the target for people.

        Args:
            ids: the ids of the terms, with the best token filled in.
        """
        pieces = lm.token_texts(ids[: len(terms.terms) + len(terms.rivals)].tolist())
        named = [f"{'-' if sign < 0 else '+'} {p!r}" for p, (_, sign) in zip(pieces, terms.terms, strict=False)]
        if terms.rivals:
            named.append(f"- average of {', '.join(map(repr, pieces[len(terms.terms) :]))}")
        if terms.mean:
            named.append("- mean")
        text = " ".join(named)[2:]
        return f"log p({text})" if terms.expected else text


TargetClass = TypeVar("TargetClass", bound=type[Target])

TARGETS: Registry[type[Target]] = Registry("target", "moejax.relevance.targets", PromptError)
"""The classes of targets by name, for the command line (:func:`parse_target`)."""


def register_target(name: str) -> Callable[[TargetClass], TargetClass]:
    """Decorator that enters a target's class in :data:`TARGETS`. Its docstring's first line is its help.

    Raises:
        ConfigError: another class has the name.
    """
    return TARGETS.register(name)


def checked_target(target: Any) -> Target:
    """Return ``target`` if it is one; a token's text or id stands for :class:`moejax.Token`.

    Raises:
        PromptError: it is something else.
    """
    if isinstance(target, str | int | np.integer) and not isinstance(target, bool):
        token: Any = TARGETS.find("token")
        return token(target)
    if not isinstance(target, Target):
        raise PromptError(f"target={target!r:.80} is none of moejax's targets, such as moejax.Token(' token').")
    return target


def token_id(lm: LM, token: TokenName) -> int:
    """Return the id of a token that is named by its text or its id.

    Raises:
        PromptError: the text is not one token, or the id is out of range.
    """
    if isinstance(token, str):
        return lm.need_tokenizer().token_id(token)
    return int(lm.check([token])[0])


def checked_position(position: int, length: int) -> int:
    """Return ``position`` counted from the beginning.

    Raises:
        PromptError: it is outside the prompt of ``length`` tokens.
    """
    if not -length <= position < length:
        raise PromptError(f"position {position} is outside the prompt of {length} tokens.")
    return position % length
