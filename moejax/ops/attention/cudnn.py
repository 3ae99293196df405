"""cuDNN's attention for NVIDIA GPUs: the forward pass and the backward pass of the kernel as two functions.

``jax.nn.dot_product_attention`` calls the same kernel. But it returns the statistics of the softmax in bfloat16, and
its backward pass takes no other statistics, so learned sinks could not be added to them. So we call the functions of
JAX beneath it.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.ops.attention.fused import Kernel, fused, supports
from moejax.ops.attention.registry import Options, register_attention

kernels: Any = None
with suppress(ImportError):
    kernels = import_module("jax._src.cudnn.fused_attention_stablehlo")

AVAILABLE = all(hasattr(kernels, f"_dot_product_attention_{name}_rule") for name in ("fwd", "bwd"))
"""True if this version of JAX has these functions; both versions that moejax is tested with do."""

_SEED, _DROPOUT = 0, 0.0


def _forward(
    q: Float[Array, "B T H C"], k: Float[Array, "B T G C"], v: Float[Array, "B T G C"], scale: float, window: int | None
) -> tuple[Float[Array, "B T H C"], Float[Array, "B H T"]]:
    settings = _settings(scale, window, kernels.check_cudnn_version())
    out, saved = kernels._dot_product_attention_fwd_rule(q, k, v, *_unused(q), *settings)
    return out, saved[-2]


def _backward(
    cotangent: Float[Array, "B T H C"],
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    out: Float[Array, "B T H C"],
    statistics: Float[Array, "B H T"],
    scale: float,
    window: int | None,
) -> tuple[Array, Array, Array]:
    settings = _settings(scale, window, kernels.check_cudnn_version())
    saved = (q, k, v, *_unused(q), statistics, out)
    return tuple(kernels._dot_product_attention_bwd_rule(*settings, saved, cotangent)[:3])


def _settings(scale: float, window: int | None, version: int) -> tuple[Any, ...]:
    causal, layout = kernels.MaskType.CAUSAL, kernels.AttentionLayout.BTNH.value
    bias_and_its_gradient = (False, False)
    return scale, _SEED, _DROPOUT, bias_and_its_gradient, causal, layout, window, version, False


def _unused(q: Array) -> list[Array]:
    """Bias, lengths, offsets and pages, which are not used."""
    return [jnp.zeros(0, q.dtype)] * 7


CUDNN = Kernel(_forward, _backward)
"""The kernel, for bfloat16 or float16 on a GPU of compute capability 8.0 or later."""


def _supports(q: Array, k: Array, v: Array, causal: bool) -> bool:
    return AVAILABLE and q.shape[-1] == v.shape[-1] and supports(q, k, causal)


@register_attention("fused", priority=30, supports=_supports, optional_mask=True)
def cudnn_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    mask: Bool[Array, "B T T"] | None,
    sinks: Float[Array, " H"] | None,
    options: Options,
) -> Float[Array, "B T H C"]:
    """Attention by cuDNN's kernel, or by blocks if there is padding; arguments as in :func:`attention`."""
    if not options.causal or not AVAILABLE:
        why = "is not in this version of JAX" if options.causal else "is for causal attention"
        raise ValueError(f"implementation='fused' {why}; leave it out.")
    return fused(q, k, v, mask, sinks, options, kernel=CUDNN)
