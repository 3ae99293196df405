"""Tiny random decoders of moejax's own configs.

Effects are visible: weights are far from zero, norm weights far from one. Sizes all differ: T=7, D=40, F=20, E=6, K=2,
H=4, G=2, C=10, L=3, V=97.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import LM, Contrast
from moejax.layers import (
    AttentionConfig,
    BlockConfig,
    MixtureAttentionConfig,
    MixtureConfig,
    MLPConfig,
    RouterConfig,
    SharedConfig,
)
from moejax.models import Config, Decoder
from moejax.ops.rope import Rope
from tiny.tokenizers import word_tokenizer

T, D, F, E, K, H, G, C, L, V = 7, 40, 20, 6, 2, 4, 2, 10, 3, 97

PROMPT = [5, 80, 33, 96, 0, 33, 12]
ROW = jnp.asarray([PROMPT], jnp.int32)


def make_config(
    *,
    layers: int = L,
    clip: float | None = None,
    bias: bool = False,
    weigh: str = "raw",
    qk_norm: str | None = "full",
    tied: bool = False,
    sizes: tuple[int, ...] = (D, F, E, K, H, G, C),
    eos_ids: tuple[int, ...] = (),
) -> Config:
    """A decoder whose blocks are alike: attention and a mixture. ``sizes`` are ``(D, F, E, K, H, G, C)``."""
    d, f, e, k, h, g, c = sizes
    return Config(
        model_type="olmoe",
        vocab_size=V,
        blocks=(
            BlockConfig(
                AttentionConfig(d, h, g, c, 1e-5, Rope(100.0), qk_norm=qk_norm, clip=clip, bias=bias, output_bias=bias),
                MixtureConfig(d, f, RouterConfig(e, k, weigh=weigh)),
                norm_eps=1e-5,
            ),
        )
        * layers,
        norm_eps=1e-5,
        tied=tied,
        max_positions=64,
        eos_ids=eos_ids,
        pad_id=1,
    )


def fill(config: Config, draw: Callable[[str, tuple[int, ...]], np.ndarray], dtype: Any = None) -> Decoder:
    """A decoder each of whose leaves is ``draw(path, shape)``, in ``dtype`` or else in the leaf's own."""

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draw(jax.tree_util.keystr(path), leaf.shape), dtype or leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, Decoder.abstract(config))


def noisy(config: Config, seed: int, dtype: Any) -> Decoder:
    """Random weights, large for their kind: matrices keep activations near unit size, norms are far from one."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        std = 1.0 if "embedding" in name else 0.3 if len(shape) < 2 else 1.3 / np.sqrt(shape[-1])
        return ("norm" in name) + rng.normal(0, std, shape)

    return fill(config, draw, dtype)


@cache
def make_lm(seed: int = 0, dtype: str = "float32", **options: Any) -> LM:
    """A model with options of :func:`make_config`; float64 needs the fixture ``x64``."""
    return LM(noisy(make_config(**options), seed, jnp.dtype(dtype)), word_tokenizer(V), "toy")


LAYERS = 2
"""Layers of a model to which a third layer would add compile time alone."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip-bias": {"clip": 0.8, "bias": True},
    "renormalised": {"weigh": "renormalised", "tied": True},
}


def variant_lm(variant: str, seed: int = 0, dtype: str = "float32", layers: int = LAYERS) -> LM:
    """A model of one of :data:`VARIANTS`."""
    return make_lm(seed, dtype, layers=layers, **VARIANTS[variant])


def best_and_worst(lm: LM, position: int = -1) -> Contrast:
    """A target that is never near zero: the largest logit minus the smallest."""
    logits = np.asarray(lm(ROW))[0, position]
    return Contrast(int(logits.argmax()), int(logits.argmin()), position)


def mixture_lm() -> LM:
    """A model in float64 with attention experts and a shared expert; its second layer is dense."""
    router = RouterConfig(E, K, score="logits", weigh="softmax", bias=True)
    attention = MixtureAttentionConfig(D, G, C, router, Rope(100.0))
    blocks = (
        BlockConfig(attention, MixtureConfig(D, F, router, shared=SharedConfig(14, routed=True)), 1e-5),
        BlockConfig(attention, MLPConfig(D, 22), 1e-5),
    )
    config: Config = replace(make_config(layers=LAYERS), blocks=blocks)
    return LM(noisy(config, 0, jnp.float64), word_tokenizer(V), "mixture")
