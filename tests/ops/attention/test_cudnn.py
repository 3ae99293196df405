"""How JAX's functions for cuDNN's kernel are called, with formulas in the kernel's place that run on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as kernels
from jax.interpreters import mlir

from moejax.ops.attention import attention
from moejax.ops.attention.cudnn import CUDNN
from moejax.ops.attention.fused import fused
from moejax.ops.attention.registry import Options
from ops.attention.explicit import explicit_backward, explicit_forward

B, T, H, G, C = 2, 8, 4, 2, 16


def forward(q, k, v, *_, scale: float, sliding_window_length: int | None, is_training: bool, **settings: Any) -> list:
    assert settings["mask_type"] is kernels.MaskType.CAUSAL
    assert is_training, "statistics are asked for"
    out, statistics = explicit_forward(*(x.astype(jnp.float32) for x in (q, k, v)), scale, sliding_window_length)
    return [out.astype(q.dtype), statistics]


def backward(q, k, v, *rest, scale: float, sliding_window_length: int | None, **settings: Any) -> list:
    assert settings["mask_type"] is kernels.MaskType.CAUSAL
    statistics, out, cotangent = rest[-3:]
    wide = [x.astype(jnp.float32) for x in (cotangent, q, k, v, out)]
    return [x.astype(q.dtype) for x in explicit_backward(*wide, statistics, scale, sliding_window_length)]


@pytest.fixture
def on_a_cpu(monkeypatch):
    for check in ("check_cudnn_version", "check_compute_capability", "check_is_flash_attention"):
        monkeypatch.setattr(kernels, check, lambda *_: 91000)
    for primitive, formula in (
        (kernels._dot_product_attention_fwd_p, forward),
        (kernels._dot_product_attention_bwd_p, backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(formula, multiple_results=True), platform="cpu")


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sunk", [False, True], ids=["no sinks", "sinks"])
def test_equals_blocks(sunk, window):
    """Values and gradients, of one cotangent and of several."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    operands = [normal(B, T, heads, C) for heads in (H, G, G)] + [jnp.linspace(-1, 2, H, dtype=jnp.bfloat16)] * sunk
    received = normal(3, B, T, H, C)

    def both(run):
        def read(q, k, v, *sinks):
            return run(q, k, v, None, sinks[0] if sinks else None)

        out, pull = jax.vjp(read, *operands)
        return out, pull(received[0]), jax.vmap(pull)(received)

    options = Options(scale=0.3, causal=True, window=window, block=T)

    def blocks(q, k, v, mask, sinks):
        return attention(
            q, k, v, mask, sinks=sinks, scale=0.3, causal=True, window=window, block=T, implementation="blocks"
        )

    got = jax.jit(lambda: both(partial(fused, options=options, kernel=CUDNN)))()
    want = jax.jit(lambda: both(blocks))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(a, float), np.asarray(b, float), atol=0.02 * np.abs(b.astype(float)).max()
        )
