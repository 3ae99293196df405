"""Sums that XLA's compiler for CPUs got wrong (jaxlib 0.10.2), and what keeps them from results."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny.four_devices import VOCABULARY, single

from moejax import Continuation, explain, explain_batch
from moejax.xla import _MENDED, _sums_are_right, refuse_wrong_sums

SUMS = """
import numpy as np, jax, jax.numpy as jnp
{first}
import moejax
from moejax.xla import refuse_wrong_sums
refuse_wrong_sums()
"""


@pytest.mark.parametrize("shape", [(5, 12, 12, 12), (5, 12, 12)], ids=str)
def test_sums_of_products_that_broadcast(shape: tuple[int, ...]) -> None:
    """The product of the first shape was summed wrongly."""
    rng = np.random.default_rng(0)
    p = rng.random(shape, np.float32)
    t = rng.normal(size=(4, *p.shape)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda p, t: p * (t - (p * t).sum(-1, keepdims=True)), (None, 0)))(p, t)
    want = p * (t - (p * t).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_targets_of_several_prompts() -> None:
    """A shape at which the last target of each prompt was wrong by a tenth of the largest value."""
    rows = np.random.default_rng(0).integers(1, VOCABULARY, (5, 9)).tolist()
    target = Continuation((5, 7, 11, 2))
    for found, row in zip(explain_batch(single("olmoe"), rows, target=target), rows, strict=True):
        want = explain(single("olmoe"), row, target=target, chunk=1).layers
        np.testing.assert_allclose(found.layers, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_sums_are_checked_without_jit_too() -> None:
    _sums_are_right.cache_clear()
    with jax.disable_jit():
        refuse_wrong_sums()


@pytest.mark.skipif(jax.__version_info__ >= _MENDED, reason="this jaxlib adds up rightly")
def test_sums_are_refused_where_it_is_too_late() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}

    def run(first):
        return subprocess.run(
            [sys.executable, "-c", SUMS.format(first=first)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    late, early = run("jnp.ones(3).sum()"), run("")
    assert early.returncode == 0, early.stderr
    assert "adds up wrongly on CPUs" in late.stderr
