"""A fault of XLA's compiler for CPUs that reached results, kept from them.

With jaxlib 0.10.2 what it compiles to a library call (YNNPACK) for a product that is summed, ``sum(p * t, -1)``, and
then meets other arrays again is wrong beyond the first entries of ``t`` where ``p`` lacks a leading axis of ``t``, as
every value of the forward pass lacks that of the targets. It depends on sizes: with grouped queries, five prompts and
twelve tokens the last of four targets was wrong, with the bundled model none that was tried. With jaxlib 0.11.2 it is
right.
"""

import os
from functools import cache
from importlib.metadata import version

import jax
import numpy as np
from jaxtyping import Array, Float

from moejax.errors import MoejaxError

_MENDED = (0, 11, 2)
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def without_library_sums() -> None:
    """Have XLA compile sums itself; without effect where JAX has computed something before."""
    given = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ < _MENDED and _FLAG not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_FLAG}=-reduce".strip()


def refuse_wrong_sums() -> None:
    """Check that sums are right, once in a process.

    Raises:
        MoejaxError: they are not.
    """
    if jax.__version_info__ < _MENDED and jax.default_backend() == "cpu" and not _sums_are_right():
        have, mended = version("jaxlib"), ".".join(map(str, _MENDED))
        raise MoejaxError(
            f"this jaxlib ({have}) adds up wrongly on CPUs. Import moejax before JAX computes anything, "
            f"set XLA_FLAGS={_FLAG}=-reduce, or install jax {mended} (Python 3.12)."
        )


@cache
def _sums_are_right() -> bool:
    def lessened(p: Float[Array, "*s"], t: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return p * (t - (p * t).sum(-1, keepdims=True))

    p = np.linspace(0, 1, 5 * 12 * 12 * 12, dtype=np.float32).reshape(5, 12, 12, 12)
    t = np.stack([p, p + 1, p + 2, p + 3])
    with jax.disable_jit(False):
        found = jax.jit(jax.vmap(lessened, (None, 0))).lower(p, t).compile()(p, t)
    want = p * (t - (p * t).sum(-1, keepdims=True))
    return bool(np.abs(np.asarray(found) - want).max() < 1e-3)
