"""The kernels that give slots rows and copy rows against what XLA makes of the same.

Where there is no GPU, Pallas's interpreter runs them.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from moejax.ops.experts import assign, assignment, places, rows, spread
from moejax.ops.experts.copies import copies
from moejax.ops.target import generation, target

INTERPRET = generation(target()) < 8


def ids_of(tokens: int, slots: int, experts: int, skew: float, seed: int = 0) -> jax.Array:
    """Distinct experts for each token; a skew makes the first ones frequent, or the last."""
    scores = np.random.default_rng(seed).gumbel(size=(tokens, experts)) - skew * np.arange(experts)
    return jnp.asarray(np.argsort(-scores, axis=1)[:, :slots], jnp.int32)


def plainly(ids: jax.Array, experts: int) -> assignment.Assignment:
    """Without the kernel."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(assignment, "fits", lambda _: False)
        return assign(ids, experts, by_expert=True)


def same_places(ids: jax.Array, experts: int) -> None:
    want = plainly(ids, experts)
    names = ("rank", "load", "first", "place", "slot")
    for name, found in zip(names, places.places(ids, experts, interpret=INTERPRET), strict=True):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, getattr(want, name), err_msg=name)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_places_are_those_of_the_sums(tokens, slots, more, skew, seed):
    same_places(ids_of(tokens, slots, slots + more, skew, seed), slots + more)


@pytest.mark.parametrize("skew", [-0.4, 0.0, 0.4], ids=["last experts alone", "even", "first experts alone"])
def test_slots_in_several_parts(monkeypatch, skew):
    monkeypatch.setattr(places, "_TOGETHER", 64)
    jax.clear_caches()
    same_places(ids_of(53, 4, 32, skew), 32)
    jax.clear_caches()


@pytest.mark.usefixtures("x64")
def test_double_precision_changes_no_place():
    same_places(ids_of(9, 2, 5, 0.0), 5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(5, 24), (3, 1024), (4, 2880)], ids=str)
def test_rows_are_copied(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    index = jnp.asarray(np.random.default_rng(1).integers(0, 2 * len(x), 37), jnp.int32)
    np.testing.assert_array_equal(copies(x, index, 2, interpret=INTERPRET), x[index // 2])


def test_who_takes_the_kernels(monkeypatch):
    """A GPU, for slots that all go somewhere and lie on one device, in rows by expert."""
    ids, taken = ids_of(6, 2, 4, 0.0), []
    plain = plainly(ids, 4)
    with monkeypatch.context() as patched:
        patched.setattr(places, "target", lambda *_: SimpleNamespace(compute_capability="9.0"))
        for module, kernel in ((places, "places"), (rows, "copies")):
            own = getattr(module, kernel)
            patched.setattr(
                f"moejax.ops.experts.{'assignment' if kernel == 'places' else 'rows'}.{kernel}",
                lambda *args, own=own, kernel=kernel: taken.append(kernel) or own(*args, interpret=INTERPRET),
            )
        found = assign(ids, 4)
        jax.tree.map(np.testing.assert_array_equal, found, plain)
        x = jnp.ones((6, 1, 3))
        np.testing.assert_array_equal(spread(x, found, copied=True), jnp.ones((len(found.slot), 3)))
        assert taken == ["places", "copies"]
        spread(x, found)
        spread(jnp.ones((6, 2, 3)), found, copied=True)
        assign(ids, 4, nowhere=True)
        assign(ids, 4, by_expert=False)
        assign(ids, 4, mesh=Mesh(np.array(jax.devices()[:1] * 2).reshape(2), ("tensor",)))
        patched.setattr(places, "has_triton", lambda: False)
        assign(ids, 4)
        assert taken == ["places", "copies"]
