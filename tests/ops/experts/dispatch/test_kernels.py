"""The kernels that rank slots and gather rows against plain JAX. Without a GPU, Pallas's interpreter runs them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from moejax.ops import device as targets
from moejax.ops.device import compute_capability, target
from moejax.ops.experts import Assignment, assign, permute
from moejax.ops.experts.dispatch import assignment, rank_slots
from moejax.ops.experts.dispatch import permute as permute_module
from moejax.ops.experts.dispatch.gather_rows import gather_rows

INTERPRET = compute_capability(target()) < 8


def ids_of(tokens: int, slots: int, experts: int, skew: float, seed: int = 0) -> jax.Array:
    """Distinct experts for each token; a skew makes the first ones frequent, or the last."""
    scores = np.random.default_rng(seed).gumbel(size=(tokens, experts)) - skew * np.arange(experts)
    return jnp.asarray(np.argsort(-scores, axis=1)[:, :slots], jnp.int32)


def plainly(ids: jax.Array, experts: int) -> Assignment:
    """Without the kernel."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(assignment, "takes_triton", lambda _: False)
        return assign(ids, experts, by_expert=True)


def same_rows(ids: jax.Array, experts: int) -> None:
    want = plainly(ids, experts)
    names = ("rank_in_expert", "group_sizes", "group_offsets", "slot_to_row", "row_to_slot")
    results = rank_slots.rank_slots(ids, experts, interpret=INTERPRET)
    for name, result in zip(names, results, strict=True):
        assert result.dtype == jnp.int32
        np.testing.assert_array_equal(result, getattr(want, name), err_msg=name)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_the_kernel_equals_cumulative_sums(tokens, slots, more, skew, seed):
    same_rows(ids_of(tokens, slots, slots + more, skew, seed), slots + more)


@pytest.mark.parametrize("skew", [-0.4, 0.0, 0.4], ids=["last experts alone", "even", "first experts alone"])
def test_slots_in_several_parts(monkeypatch, skew):
    monkeypatch.setattr(rank_slots, "_SLOTS_AT_A_TIME", 64)
    jax.clear_caches()
    same_rows(ids_of(53, 4, 32, skew), 32)
    jax.clear_caches()


@pytest.mark.usefixtures("x64")
def test_double_precision_changes_no_row():
    same_rows(ids_of(9, 2, 5, 0.0), 5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(5, 24), (3, 1024), (4, 2880)], ids=str)
def test_rows_are_copied(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    index = jnp.asarray(np.random.default_rng(1).integers(0, 2 * len(x), 37), jnp.int32)
    np.testing.assert_array_equal(gather_rows(x, index, 2, interpret=INTERPRET), x[index // 2])


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Pretend that there is a GPU; the names of the kernels that were traced for it."""
    names: list[str] = []
    gpu = SimpleNamespace(compute_capability="9.0", platform="gpu")
    monkeypatch.setattr(targets, "target", lambda *_: gpu)
    for module, name in ((assignment, "rank_slots"), (permute_module, "gather_rows")):
        kernel = getattr(module, name)

        def spy(*args, kernel=kernel, name=name, **options):
            names.append(name)
            return kernel(*args, **options, interpret=True)

        monkeypatch.setattr(module, name, spy)
    return names


def test_when_the_kernels_are_taken(taken, monkeypatch):
    """If no slot is unassigned, in rows by expert, on one device and outside of ``shard_map``."""
    ids = ids_of(6, 2, 4, 0.0)
    x, assigned = jnp.ones((6, 1, 3)), plainly(ids, 4)
    jax.eval_shape(lambda ids: assign(ids, 4), ids)
    jax.eval_shape(lambda x: permute(x, assigned, copied=True), x)
    assert taken == ["rank_slots", "gather_rows"]
    mesh = Mesh(np.array(jax.devices()[:1] * 2), ("tensor",))
    for options in ({"allow_unassigned": True}, {"by_expert": False}, {"mesh": mesh}):
        jax.eval_shape(lambda ids, options=options: assign(ids, 4, **options), ids)
    jax.eval_shape(lambda ids: assign(ids, 4, by_expert=True), ids[:0])
    jax.eval_shape(lambda x: permute(x, assigned), x)
    jax.eval_shape(lambda x: permute(x, assigned, copied=True), jnp.ones((6, 2, 3)))
    one = Mesh(np.array(jax.devices()[:1]), ("expert",))
    spec = PartitionSpec("expert")
    each = jax.shard_map(lambda ids: assign(ids, 4).row_to_slot, mesh=one, in_specs=spec, out_specs=spec)
    jax.eval_shape(each, ids)
    monkeypatch.setattr(targets, "find_spec", lambda _: None)
    jax.eval_shape(lambda ids: assign(ids, 4), ids)
    assert taken == ["rank_slots", "gather_rows"]


@pytest.mark.usefixtures("taken")
def test_a_program_for_the_cpu_is_what_it_was():
    """Where there is a GPU too: what runs it is known when the program is compiled."""
    ids = ids_of(6, 2, 4, 0.0)
    result, x = jax.jit(lambda ids: assign(ids, 4))(ids), jnp.ones((6, 1, 3))
    jax.tree.map(np.testing.assert_array_equal, result, plainly(ids, 4))
    text = jax.jit(lambda ids, x: permute(x, assign(ids, 4), copied=True)).lower(ids, x).as_text()
    assert "while" not in text, "nor has it a loop of Pallas's interpreter"
