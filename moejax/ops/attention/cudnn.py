"""cuDNN's attention for NVIDIA GPUs: the two passes of the kernel, apart.

``jax.nn.dot_product_attention`` calls the same kernel, but hands out the statistics of its softmax in bfloat16 and
takes none on the way back, so that learned sinks could not have a share in them. Hence JAX's own functions beneath it.
"""

from contextlib import suppress
from importlib import import_module
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.ops.attention.fused import Kernel

kernels: Any = None
with suppress(ImportError):
    kernels = import_module("jax._src.cudnn.fused_attention_stablehlo")

AVAILABLE = all(hasattr(kernels, f"_dot_product_attention_{way}_rule") for way in ("fwd", "bwd"))
"""Whether this version of JAX has them; both that moejax is tested with do."""

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
    """Bias, lengths, offsets and pages."""
    return [jnp.zeros(0, q.dtype)] * 7


CUDNN = Kernel(_forward, _backward)
"""For bfloat16 or float16 on a GPU of compute capability 8 or above."""
