"""What is explained: logits, differences of them, log-probabilities, a router's choice, a direction of the stream."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moejax.errors import PromptError
from moejax.relevance.engine import BEST, LogitSeeds, RoutingSeeds, Seeds, StreamSeeds

if TYPE_CHECKING:
    from moejax.lm import LM


TokenName = str | SupportsIndex
"""A token's text or its id."""


@dataclass(frozen=True)
class TargetTerms:
    """One target: the sum over ``terms`` of sign times logit, at ``position``, less what it is compared with.

    Attributes:
        position: index of the token whose successor is predicted, counted in the unpadded sequence.
        terms: pairs of token id (or :data:`BEST`) and sign.
        rivals: token ids whose logits' average, weighted by their probabilities, is subtracted.
        mean: how often the average logit of all tokens is subtracted.
        expected: how often the expected logit is subtracted, ``sum p z``: the log-probability's gradient.
    """

    position: int
    terms: tuple[tuple[int, float], ...]
    rivals: tuple[int, ...] = ()
    mean: float = 0.0
    expected: float = 0.0


class Target(ABC):
    """A question about a prompt. Resolves to the sequence to run and N aims in it."""

    joint = False
    """Whether the aims are one target, their sum."""

    @abstractmethod
    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        """The token ids of the forward pass (the prompt, perhaps continued) and the targets read from it.

        Raises:
            PromptError: a named token is several tokens, an id or a position is out of range.
        """

    def seeds(self, rows: list[list[TargetTerms]], dtype: DTypeLike) -> Seeds:
        """The aims of each sequence as arrays; those with fewer are filled up with aims at nothing."""
        terms = max(len(aim.terms) + len(aim.rivals) for aims in rows for aim in aims)
        count = max(map(len, rows))
        positions, ids = np.zeros((len(rows), count), np.int32), np.zeros((len(rows), count, terms), np.int32)
        signs, rivals = np.zeros(ids.shape, dtype), np.zeros(ids.shape, bool)
        mean, expected = np.zeros((2, *positions.shape), dtype)
        for row, aims in enumerate(rows):
            for n, aim in enumerate(aims):
                positions[row, n] = aim.position
                mean[row, n], expected[row, n] = aim.mean, aim.expected
                for j, (token, sign) in enumerate([*aim.terms, *((token, 0.0) for token in aim.rivals)]):
                    ids[row, n, j], signs[row, n, j] = token, sign
                    rivals[row, n, j] = j >= len(aim.terms)
        # together, and of the types that they have there: one by one, and converted there, they take milliseconds
        placed = jax.device_put((positions, ids, signs, rivals, mean, expected))
        return LogitSeeds(*placed, dense=bool(mean.any() or expected.any()))

    def label(self, lm: "LM", aim: TargetTerms, ids: np.ndarray) -> str:
        """What the aim is, for people; ``ids`` are its tokens, the best one filled in."""
        pieces = lm.pieces(ids[: len(aim.terms) + len(aim.rivals)].tolist())
        named = [f"{'-' if sign < 0 else '+'} {p!r}" for p, (_, sign) in zip(pieces, aim.terms, strict=False)]
        if aim.rivals:
            named.append(f"- average of {', '.join(map(repr, pieces[len(aim.terms) :]))}")
        if aim.mean:
            named.append("- mean")
        text = " ".join(named)[2:]
        return f"log p({text})" if aim.expected else text


def checked_target(target: Any) -> Target:
    """``target``, if it is one.

    Raises:
        PromptError: it is something else.
    """
    if not isinstance(target, Target):
        example = target if isinstance(target, str | int) else " token"
        raise PromptError(f"target={target!r} is none of moejax's targets, such as moejax.Token({example!r}).")
    return target


def _token_id(lm: "LM", token: TokenName) -> int:
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

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        return prompt, [TargetTerms(_position(self.position, len(prompt)), ((BEST, 1.0),))]


@dataclass(frozen=True)
class Token(Target):
    """The logit of one token, named by its text (exactly one token) or id."""

    token: TokenName
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        return prompt, [TargetTerms(_position(self.position, len(prompt)), ((_token_id(lm, self.token), 1.0),))]


@dataclass(frozen=True)
class Contrast(Target):
    """The logit of one token minus that of another; blind to what raises all logits alike.

    ``other`` may be several tokens: their average logit, weighted by their probabilities.
    """

    token: TokenName
    other: TokenName | Sequence[TokenName]
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        position, token = _position(self.position, len(prompt)), _token_id(lm, self.token)
        given = np.asarray(self.other, object)
        others = [_token_id(lm, other) for other in given.ravel()]
        if token in others or not others:
            raise PromptError(f"a contrast needs two tokens; {self.token!r} stands on both sides, or nothing on one.")
        if given.ndim:
            # each counts once, however often it is named
            return prompt, [TargetTerms(position, ((token, 1.0),), rivals=tuple(dict.fromkeys(others)))]
        return prompt, [TargetTerms(position, ((token, 1.0), (others[0], -1.0)))]


@dataclass(frozen=True)
class MeanContrast(Target):
    """The logit of one token minus the mean of all."""

    token: TokenName
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        return prompt, [
            TargetTerms(_position(self.position, len(prompt)), ((_token_id(lm, self.token), 1.0),), mean=1.0)
        ]


@dataclass(frozen=True)
class LogProbability(Target):
    """The log-probability of one token, expanded at its logits: ``z - sum p z`` is what is shared out."""

    token: TokenName
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        return prompt, [
            TargetTerms(_position(self.position, len(prompt)), ((_token_id(lm, self.token), 1.0),), expected=1.0)
        ]


@dataclass(frozen=True)
class Continuation(Target):
    """Every token of a given answer: N targets from one forward pass over prompt and answer."""

    answer: str | Sequence[int]

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        answer = self.answer
        ids = lm.need_tokenizer().encode(answer, special=False) if isinstance(answer, str) else list(answer)
        if not ids:
            raise PromptError("the answer is empty: there is no token to explain.")
        return _teacher_forced(prompt, lm.check(ids).tolist())


@dataclass(frozen=True)
class Generated(Target):
    """Every token that the model itself generates, greedily."""

    max_new_tokens: int = 10

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        new = lm.generate_ids([prompt], max_new_tokens=self.max_new_tokens)[0]
        # an immediate end of text generates nothing; the end token itself is then what there is to explain
        return _teacher_forced(prompt, new) if new else Argmax().resolve(lm, prompt)


@dataclass(frozen=True)
class Span(Target):
    """The log-probability of a whole answer: one target, the sum of its tokens' (:class:`LogProbability`)."""

    answer: str | Sequence[int]
    joint = True

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        ids, aims = Continuation(self.answer).resolve(lm, prompt)
        return ids, [TargetTerms(aim.position, aim.terms, expected=1.0) for aim in aims]


@dataclass(frozen=True)
class RouterChoice(Target):
    """A router's logit of one expert, at a token, minus that of another: why the token was sent there.

    ``attention`` asks a mixture of attention experts.
    """

    layer: int
    expert: int
    versus: int
    position: int = -1
    attention: bool = False

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        in_range = -lm.config.num_layers <= self.layer < lm.config.num_layers
        half = "attention" if self.attention else "feed_forward"
        experts = lm.config.blocks[self.layer].half(half).sizes.num_router_outputs if in_range else 0
        if not experts:
            raise PromptError(f"layer {self.layer} has no router.")
        if self.expert == self.versus or not all(0 <= e < experts for e in (self.expert, self.versus)):
            raise PromptError(f"experts {self.expert} and {self.versus} must be two of {experts}.")
        terms = ((self.expert, 1.0), (self.versus, -1.0))
        return prompt, [TargetTerms(_position(self.position, len(prompt)), terms)]

    def seeds(self, rows: list[list[TargetTerms]], dtype: DTypeLike) -> Seeds:
        logits = super().seeds(rows, dtype)
        assert isinstance(logits, LogitSeeds)
        return RoutingSeeds(logits.positions, logits.ids, logits.signs, self.layer, self.attention)

    def label(self, lm: "LM", aim: TargetTerms, ids: np.ndarray) -> str:
        return f"layer {self.layer}: expert {self.expert} - expert {self.versus}"


@dataclass(frozen=True, eq=False)
class Direction(Target):
    """The residual stream that a layer reads, at one token, along a vector of the model's width.

    A probe's weight, a dictionary's feature, or a row of the identity for one of its numbers. ``layer`` may be the
    number of layers: the stream that leaves the last.
    """

    vector: Any
    layer: int
    position: int = -1

    def resolve(self, lm: "LM", prompt: list[int]) -> tuple[list[int], list[TargetTerms]]:
        if np.shape(self.vector) != (lm.config.model_dim,) or not 0 <= self.layer <= lm.config.num_layers:
            raise PromptError(
                f"a direction of shape {np.shape(self.vector)} at layer {self.layer}: the stream has "
                f"{lm.config.model_dim} numbers, and layers 0 to {lm.config.num_layers}."
            )
        return prompt, [TargetTerms(_position(self.position, len(prompt)), ())]

    def seeds(self, rows: list[list[TargetTerms]], dtype: DTypeLike) -> Seeds:
        positions = [[aim.position for aim in aims] for aims in rows]
        directions = jnp.broadcast_to(jnp.asarray(self.vector, dtype), (len(rows), 1, np.size(self.vector)))
        return StreamSeeds(jnp.asarray(positions, jnp.int32), directions, self.layer)

    def label(self, lm: "LM", aim: TargetTerms, ids: np.ndarray) -> str:
        return f"stream {self.layer} along a direction"


def _teacher_forced(prompt: list[int], answer: list[int]) -> tuple[list[int], list[TargetTerms]]:
    aims = [TargetTerms(len(prompt) - 1 + i, ((token, 1.0),)) for i, token in enumerate(answer)]
    return prompt + answer[:-1], aims
