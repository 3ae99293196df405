"""A small model with visible effects: weights far from zero, norm weights far from one, no two sizes alike."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from moejax import LM, Contrast
from moejax.checkpoints.tokenizer import Tokenizer
from moejax.layers import AttentionConfig, BlockConfig, MixtureConfig, RouterConfig
from moejax.models import Config, Decoder
from moejax.ops.rope import Rope

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
    d, f, e, k, h, g, c = sizes
    return Config(
        model_type="olmoe",
        vocab_size=V,
        blocks=(
            BlockConfig(
                AttentionConfig(d, h, g, c, norm_eps=1e-5, qk_norm=qk_norm, clip=clip, bias=bias, output_bias=bias),
                MixtureConfig(d, f, RouterConfig(e, k, weigh=weigh)),
                norm_eps=1e-5,
            ),
        )
        * layers,
        rope=Rope(100.0),
        norm_eps=1e-5,
        tied=tied,
        max_positions=64,
        eos_ids=eos_ids,
        pad_id=1,
    )


def noisy(config: Config, seed: int, dtype: Any) -> Decoder:
    """Random weights, large for their kind: matrices keep activations near unit size, norms are far from one."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        std = 1.0 if "embedding" in name else 0.3 if len(leaf.shape) < 2 else 1.3 / np.sqrt(leaf.shape[-1])
        return jnp.asarray(("norm" in name) + rng.normal(0, std, leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(fill, Decoder.abstract(config))


@cache
def make_lm(seed: int = 0, dtype: str = "float32", **options: Any) -> LM:
    """``options`` as in :func:`make_config`; float64 needs the ``x64`` fixture."""
    return LM(noisy(make_config(**options), seed, jnp.dtype(dtype)), word_tokenizer(), "toy")


LAYERS = 2
"""Where the third layer would show nothing new and costs compile time."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip-bias": {"clip": 0.8, "bias": True},
    "renormalised": {"weigh": "renormalised", "tied": True},
}


def variant_lm(variant: str, seed: int = 0, dtype: str = "float32", layers: int = LAYERS) -> LM:
    return make_lm(seed, dtype, layers=layers, **VARIANTS[variant])


def best_and_worst(lm: LM, position: int = -1) -> Contrast:
    """A target that is never near zero: the largest logit minus the smallest."""
    logits = np.asarray(lm(ROW))[0, position]
    return Contrast(int(logits.argmax()), int(logits.argmin()), position)


@cache
def word_tokenizer() -> Tokenizer:
    """Token ``i`` is the word ``w{i}``."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)
