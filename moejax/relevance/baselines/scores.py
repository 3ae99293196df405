"""The result of a baseline, and the table of baselines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
from jaxtyping import Float, Int

from moejax.errors import ConfigError
from moejax.lm import LM, Prompt
from moejax.registry import Registry
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.question import ResolvedTarget
from moejax.relevance.result import Attribution
from moejax.relevance.targets import Target, TargetLike
from moejax.report.numbers import listed
from moejax.report.schema import SCHEMA, ScoresReport


@dataclass(frozen=True, repr=False)
class Scores(Attribution):
    """Scores that a method gives to the parts of a model for N targets; parts that it does not score are ``None``.

    Attributes:
        method, unit: the method's name, and the unit of its numbers.
        labels, positions, token_ids, pieces: as in :class:`Relevance`.
        tokens: score of each input token.
        feed_forward, attention: scores of the routed slots; methods that score experts give all slots of one expert
            the same score.
        heads: score of each attention head's output for a token.
        shared: score of the shared expert's output for a token.
        gap: value of the target, minus its value for the empty input, minus all scores; ``None`` for methods whose
            scores need not add up.
    """

    method: str
    unit: str
    tokens: Float[np.ndarray, "N T"] | None = None
    feed_forward: ExpertRelevance | None = None
    attention: ExpertRelevance | None = None
    heads: Float[np.ndarray, "N L T H"] | None = None
    shared: Float[np.ndarray, "N L T 1"] | None = None
    gap: Float[np.ndarray, " N"] | None = None

    def to_dict(self) -> ScoresReport:
        """Return the scores as plain data, for JSON and for the reports; experts summed over all tokens."""
        by_expert = None if self.feed_forward is None else self.feed_forward.by_expert()
        arrays = {"tokens": self.tokens, "experts": by_expert, "heads": self.heads, "gap": self.gap}
        targets = [
            {"label": label, "position": int(self.positions[n])}
            | {name: None if array is None else listed(array[n]) for name, array in arrays.items()}
            for n, label in enumerate(self.labels)
        ]
        report = {"method": self.method, "unit": self.unit, "tokens": self.pieces, "token_ids": self.token_ids.tolist()}
        return cast(ScoresReport, {"schema": SCHEMA} | report | {"targets": targets})

    @classmethod
    def of(cls, resolved: ResolvedTarget, ids: Int[np.ndarray, "N J"], **scores: Any) -> Self:
        """Make the scores of a resolved target in one prompt.

        Args:
            ids: ids of the targets' terms, with the best token filled in.
            scores: ``method``, ``unit`` and the scores themselves.
        """
        token_ids = resolved.sequences[0]
        return cls(
            labels=resolved.labels(0, ids),
            positions=resolved.positions(0),
            token_ids=np.array(token_ids),
            pieces=resolved.lm.pieces(token_ids),
            **scores,
        )

    def total(self) -> Float[np.ndarray, " N"]:
        """Sum all scores that add up. Heads of a mixture of attention experts are left out: its experts count them."""
        heads = self.heads if self.attention is None else None
        mixtures = [m.slots for m in (self.feed_forward, self.attention) if m is not None]
        parts = [self.tokens, self.shared, heads, *mixtures]
        return sum((p.reshape(len(p), -1).sum(-1, dtype=np.float64) for p in parts if p is not None), np.zeros(1))

    @property
    def _mixture(self) -> ExpertRelevance:
        if self.feed_forward is None:
            raise AttributeError(f"{self.method} has no scores of experts of this model.")
        return self.feed_forward

    def __repr__(self) -> str:
        """Method, targets, sizes and the scored parts."""
        parts = [
            name
            for name in ("tokens", "feed_forward", "attention", "heads", "shared")
            if getattr(self, name) is not None
        ]
        return f"Scores({self.method!r}, targets={self.labels}, T={len(self.pieces)}, scored={parts})"


class Baseline(Protocol):
    """A method in the call form of :func:`moejax.explain`."""

    def __call__(self, lm: LM, prompt: Prompt, *, target: TargetLike = ...) -> Scores: ...


Method = TypeVar("Method", bound=Callable[..., Scores])

BASELINES: Registry[Baseline] = Registry("baseline", "moejax.relevance.baselines")
"""Every method with its defaults, and its variants, by name."""


def register_baseline(name: str, variants: Mapping[str, Mapping[str, Any]] | None = None) -> Callable[[Method], Method]:
    """Decorator that enters a method in :data:`BASELINES`.

    Args:
        name: name of the method with its defaults.
        variants: further names, with the options that each of them sets: ``{"integrated-gates": {"over": "gates"}}``.

    Raises:
        ConfigError: another function has one of the names, or a name is no string.
    """
    if not isinstance(name, str):
        raise ConfigError('give the baseline a name: @register_baseline("my-baseline").')

    def enter(method: Method) -> Method:
        BASELINES.add(name, method)
        for variant, options in (variants or {}).items():
            BASELINES.add(variant, partial(method, **options))
        return method

    return enter


def sum_of_joint(values: np.ndarray, target: Target) -> np.ndarray:
    """Sum a joint target's parts along the first axis; return other targets' values as they are."""
    return values.sum(0, keepdims=True) if target.joint else values
