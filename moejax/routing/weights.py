"""Weightings: routing weights of a token's selected experts from their scores.

A weighting is a function of the selected scores ``[*b, K]`` that returns weights of the same shape. All of them are
pure and have ordinary gradients. A weighting with options is a frozen dataclass, so that a configuration can hold it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Weigh = Callable[[Array], Array]
"""A weighting: ``[*b, K]`` scores of the selected experts to ``[*b, K]`` weights."""


def raw(scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """The scores themselves (Switch Transformer, arXiv 2101.03961, eq. 2; OLMoE, DeepSeek-V2)."""
    return scores


def renormalised(scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """The scores divided by their sum, so that they sum to one; zeros where all scores are zero."""
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total == 0, 1, total)


def softmax(scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """Softmax over the selected experts alone, for routers whose scores are logits (Mixtral, GPT-OSS, Granite)."""
    return jax.nn.softmax(scores, axis=-1)


@dataclass(frozen=True)
class Renormalised:
    """``scores / (max(sum, least) + eps)``: renormalisation with the guard that a published family has.

    A checkpoint's logits are reproduced to the last digits only with the guard of its family. Without ``eps`` and
    ``least``, use :func:`renormalised`, which also guards the division and gives zeros where the sum is zero.

    Attributes:
        eps: added to the sum: 1e-20 in DeepSeek-V3, GLM-4-MoE, AFMoE and Mistral 4, 1e-6 in LFM2-MoE.
        least: lower bound of the sum: 1e-12 in Ernie 4.5 (``moe_norm_min``).
    """

    eps: float = 0.0
    least: float = 0.0

    def __call__(self, scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
        if not self.eps and not self.least:
            return renormalised(scores)
        total = scores.sum(-1, keepdims=True)
        total = jnp.maximum(total, self.least) if self.least else total
        return scores / (total + self.eps if self.eps else total)


@dataclass(frozen=True)
class Scaled:
    """``factor`` times another weighting.

    Attributes:
        factor: ``routed_scaling_factor`` of DeepSeek's configs, ``route_scale`` of AFMoE's.
        weigh: the weighting that is multiplied.
    """

    factor: float | int
    weigh: Weigh = renormalised

    def __call__(self, scores: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
        return self.factor * self.weigh(scores)


def scaled(factor: float | int, weigh: Weigh = renormalised) -> Scaled:
    """The weighting ``factor * weigh(scores)``; by default of the renormalised scores, as in DeepSeek-V3."""
    return Scaled(factor, weigh)


WEIGHTS: dict[str, Weigh] = {"raw": raw, "renormalised": renormalised, "softmax": softmax}
"""Weightings without options, by name."""
