"""Every implementation of the grouped expert matmul against a loop over slots in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from slots import expert_matmul

from moejax.ops.experts import assign, grouped_matmul, matmul, permute
from moejax.ops.experts.matmul import capacities

D, M, N = 9, 5, 3

# tokens, slots, experts, largest load; the comments say which branch the load falls into
LOADS = [
    pytest.param(7, 2, 6, 5, id="one-branch"),
    pytest.param(7, 2, 6, 7, id="one-branch-all-tokens-share-an-expert"),
    pytest.param(1, 2, 6, 1, id="one-token"),
    pytest.param(7, 6, 6, 7, id="every-token-takes-every-expert"),
    pytest.param(300, 1, 20, 32, id="first-capacity-exactly-full"),
    pytest.param(300, 1, 20, 33, id="second-capacity"),
    pytest.param(300, 1, 20, 48, id="second-capacity-exactly-full"),
    pytest.param(300, 1, 20, 49, id="third-capacity"),
    pytest.param(300, 1, 20, 128, id="third-capacity-exactly-full"),
    pytest.param(300, 1, 20, 129, id="two-passes"),
    pytest.param(300, 1, 20, 256, id="two-passes-exactly-full"),
    pytest.param(300, 1, 20, 300, id="three-passes"),
    pytest.param(101, 2, 40, 10, id="two-slots-first-capacity"),
    pytest.param(101, 2, 40, 20, id="two-slots-second-capacity"),
    pytest.param(101, 2, 40, 101, id="two-slots-three-passes"),
]


def ids_with_load(tokens: int, slots: int, experts: int, load: int) -> np.ndarray:
    """Distinct experts for each token; expert 3 gets exactly ``load`` slots, the last one none if that is possible."""
    rng = np.random.default_rng(tokens * load)
    others = [e for e in range(experts) if e not in (3, experts - 1)]
    ids = np.empty((tokens, slots), np.int32)
    for t in range(tokens):
        ids[t] = np.roll(others, -t * slots)[:slots] if slots <= len(others) else np.arange(slots)
        if 3 not in ids[t] and t < load:
            ids[t, rng.integers(slots)] = 3
        rng.shuffle(ids[t])
    return rng.permutation(ids)


def operands(ids: np.ndarray, experts: int, shared: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, one matrix for each expert, N cotangents."""
    rng = np.random.default_rng(seed)
    tokens, slots = ids.shape
    x = rng.normal(size=(tokens, 1 if shared else slots, D))
    return x, rng.normal(size=(experts, M, D)), rng.normal(size=(N, tokens, slots, M))


def by_loop(x: np.ndarray, weight: np.ndarray, ids: np.ndarray, cotangents: np.ndarray) -> tuple[np.ndarray, ...]:
    """The product, and for each cotangent the gradients in ``x`` and ``weight``."""
    tokens, slots = ids.shape
    y = np.zeros((tokens, slots, M))
    dx, dw = np.zeros((len(cotangents), *x.shape)), np.zeros((len(cotangents), *weight.shape))
    for t in range(tokens):
        for k in range(slots):
            e, row = ids[t, k], k % x.shape[1]
            y[t, k] = weight[e] @ x[t, row]
            for n, c in enumerate(cotangents):
                dx[n, t, row] += weight[e].T @ c[t, k]
                dw[n, e] += np.outer(c[t, k], x[t, row])
    return y, dx, dw


@jax.jit(static_argnames=("implementation",))
def run(x, weight, ids, cotangents, *, implementation):
    """The product and its gradients for all cotangents at once."""
    assignment = assign(ids, weight.shape[0])
    y, pull = jax.vjp(lambda x, w: expert_matmul(x, w, assignment, implementation=implementation), x, weight)
    return y, *jax.vmap(pull)(cotangents)


@jax.jit(static_argnames=("implementation",))
def run_single(x, weight, ids, cotangent, *, implementation):
    assignment = assign(ids, weight.shape[0])
    return jax.vjp(lambda x, w: expert_matmul(x, w, assignment, implementation=implementation), x, weight)[1](cotangent)


def assert_close(got, want, tolerance):
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("implementation", ["gather", "padded"])
class TestImplementations:
    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("shared", [True, False], ids=["shared-row", "row-per-slot"])
    @pytest.mark.parametrize(("tokens", "slots", "experts", "load"), LOADS)
    def test_product_and_gradients(self, implementation, shared, tokens, slots, experts, load):
        ids = ids_with_load(tokens, slots, experts, load)
        assert np.bincount(ids.ravel(), minlength=experts).max() == load
        x, weight, cotangents = operands(ids, experts, shared)
        got = run(*map(jnp.asarray, (x, weight, ids, cotangents)), implementation=implementation)
        assert_close(got, by_loop(x, weight, ids, cotangents), 1e-12)

    @pytest.mark.parametrize("load", [5, 7])
    def test_vmap_equals_one_cotangent_at_a_time(self, implementation, load):
        ids = ids_with_load(7, 2, 6, load)
        x, weight, cotangents = (jnp.asarray(a, jnp.float32) for a in operands(ids, 6, shared=True))
        _, dx, dw = run(x, weight, jnp.asarray(ids), cotangents, implementation=implementation)
        for n in range(N):
            single = run_single(x, weight, jnp.asarray(ids), cotangents[n], implementation=implementation)
            np.testing.assert_allclose(dx[n], single[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(dw[n], single[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("tokens", "slots", "experts", "load"), [(7, 2, 6, 5), (101, 2, 40, 101)])
    def test_bfloat16(self, implementation, tokens, slots, experts, load):
        ids = ids_with_load(tokens, slots, experts, load)
        x, weight, cotangents = (jnp.asarray(a, jnp.bfloat16) for a in operands(ids, experts, shared=True))
        got = run(x, weight, jnp.asarray(ids), cotangents, implementation=implementation)
        assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
        want = by_loop(*(np.asarray(a, np.float64) for a in (x, weight)), ids, np.asarray(cotangents, np.float64))
        for a, b in zip(got, want, strict=True):
            assert np.abs(np.asarray(a, np.float64) - b).max() <= 0.02 * np.abs(b).max()

    @pytest.mark.usefixtures("x64")
    def test_empty_experts_get_zero_gradient(self, implementation):
        ids = np.tile([3, 0], (7, 1)).astype(np.int32)
        x, weight, cotangents = operands(ids, 6, shared=False)
        _, _, dw = run(*map(jnp.asarray, (x, weight, ids, cotangents)), implementation=implementation)
        assert not np.asarray(dw)[:, [1, 2, 4, 5]].any()
        assert np.asarray(dw)[:, [0, 3]].all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tokens", [1, 7])
def test_default_implementation(tokens):
    """Chosen from the shapes: one token takes ``gather``, seven take ``padded``; the answer is the same."""
    ids = ids_with_load(tokens, 2, 6, tokens)
    x, weight, cotangents = operands(ids, 6, shared=True)
    assert assign(jnp.asarray(ids), 6).by_expert == (tokens == 7)
    got = run(*map(jnp.asarray, (x, weight, ids, cotangents)), implementation=None)
    assert_close(got, by_loop(x, weight, ids, cotangents), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("by_expert", [True, False])
def test_no_weight_gradient_where_none_is_asked_for(monkeypatch, by_expert):
    """It would be removed as dead code, but only after it was traced for every product."""
    asked = []
    gradient = matmul._weight_gradient
    monkeypatch.setattr(matmul, "_weight_gradient", lambda *args: asked.append(1) or gradient(*args))
    ids = jnp.array([[0, 2], [2, 1], [3, 0]])
    x, weight, _ = map(jnp.asarray, operands(np.asarray(ids), 4, shared=False))
    assignment = assign(ids, 4, by_expert=by_expert)
    rows = permute(x, assignment)
    # as a layer is: compiled apart, the weights one of its arguments
    product = jax.jit(lambda x, weight: grouped_matmul(x, weight, assignment).sum())
    jax.grad(product)(rows, weight)
    assert not asked
    jax.grad(product, argnums=1)(rows, weight)
    assert asked


def test_gradient_of_the_gradient():
    """The gradient is the transposed product, and its own gradient the product again, in every branch."""

    @jax.jit
    def both(x, weight, ids, cotangent):
        product = lambda x: expert_matmul(x, weight, assign(ids, 40), implementation="padded")
        y, pull = jax.vjp(product, x)
        return y, jax.vjp(lambda c: pull(c)[0], cotangent)[1](x)[0]

    for load in (6, 20, 101):
        ids = ids_with_load(101, 2, 40, load)
        x, weight, cotangents = operands(ids, 40, shared=False)
        y, twice = both(*map(jnp.asarray, (x, weight, ids, cotangents[0])))
        np.testing.assert_allclose(twice, y, rtol=1e-12, atol=1e-12)


SHAPES = [(7, 2, 6), (70, 1, 17), (90, 3, 64)]
"""Tokens, slots and experts: few, because each is compiled; the loads are what varies."""


@st.composite
def skewed_ids(draw) -> tuple[np.ndarray, int]:
    """Top-k of random logits with a random slope over the experts: from balanced to collapsed."""
    tokens, slots, experts = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.floats(0, 20))
    logits = rng.gumbel(size=(tokens, experts)) - skew * rng.permutation(experts) / experts
    return np.argsort(-logits, axis=1)[:, :slots].astype(np.int32), experts


@settings(max_examples=40, deadline=None)
@given(skewed_ids(), st.booleans())
@example((ids_with_load(90, 3, 64, 90), 64), True)
def test_padded_equals_gather(drawn, shared):
    ids, experts = drawn
    operand = [jnp.asarray(a, jnp.float32) for a in operands(ids, experts, shared)]
    x, weight, cotangents = operand
    padded, gather = (run(x, weight, jnp.asarray(ids), cotangents, implementation=i) for i in ("padded", "gather"))
    for a, b in zip(padded, gather, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_capacities_cover_the_branches_tested_above():
    assert capacities(7, 2, 6) == [7]
    assert capacities(300, 1, 20) == [32, 48, 128]
    assert capacities(101, 2, 40) == [16, 48]
    assert capacities(90, 3, 64)[-1] < 90


def test_branches_stay_branches_under_vmap():
    """A switch whose index were batched would turn into a select that runs every branch."""
    ids = jnp.asarray(ids_with_load(101, 2, 40, 10))
    x, weight, cotangents = (jnp.asarray(a, jnp.float32) for a in operands(np.asarray(ids), 40, shared=True))
    program = str(jax.make_jaxpr(lambda *a: run(*a, implementation="padded"))(x, weight, ids, cotangents))
    assert program.count("cond[") == 3, "one switch each for the product and its two gradients"


@pytest.mark.parametrize("implementation", ["gather", "padded"])
def test_cotangent_may_be_a_numpy_array(implementation):
    ids = ids_with_load(7, 2, 6, 5)
    x, weight, cotangents = (np.asarray(a, np.float32) for a in operands(ids, 6, shared=True))
    assignment = assign(jnp.asarray(ids), 6)
    product = lambda x: expert_matmul(x, jnp.asarray(weight), assignment, implementation=implementation)
    (dx,) = jax.vjp(product, jnp.asarray(x))[1](cotangents[0])
    np.testing.assert_allclose(dx, by_loop(x, weight, ids, cotangents)[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("implementation", "by_expert"), [("padded", False), ("gather", True)])
def test_rows_in_another_order_are_refused(implementation, by_expert):
    assignment = assign(jnp.zeros((3, 1), int), 2, by_expert=by_expert)
    with pytest.raises(ValueError, match=f"{implementation!r} is not for rows with by_expert={by_expert}"):
        grouped_matmul(
            jnp.ones((len(assignment.slot), D)), jnp.ones((2, M, D)), assignment, implementation=implementation
        )


def test_narrow_rows_and_wide_weights():
    """Also where the loads need several passes, whose sums are carried."""
    ids = jnp.zeros((301, 1), jnp.int32)
    rows = expert_matmul(jnp.ones((301, 1, D), jnp.bfloat16), jnp.ones((20, M, D)), assign(ids, 20))
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, D)


def test_unknown_implementation():
    with pytest.raises((ValueError, TypeCheckError), match="dense"):
        expert_matmul(
            jnp.ones((1, 1, D)), jnp.ones((2, M, D)), assign(jnp.zeros((1, 1), int), 2), implementation="dense"
        )


class TestAssign:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1, 1), (7, 2, 6), (5, 6, 6), (13, 1, 4)]))
    def test_against_counting(self, seed, shape):
        tokens, slots, experts = shape
        rng = np.random.default_rng(seed)
        ids = np.stack([rng.permutation(experts)[:slots] for _ in range(tokens)]).astype(np.int32)
        assignment = assign(jnp.asarray(ids), experts)
        seen = [0] * experts
        for t in range(tokens):
            for k in range(slots):
                assert assignment.rank[t, k] == seen[ids[t, k]]
                seen[ids[t, k]] += 1
        assert assignment.load.tolist() == seen
        np.testing.assert_array_equal(assignment.ids, ids)

    def test_places_are_unique(self):
        assignment = assign(jnp.asarray(ids_with_load(101, 2, 40, 50)), 40)
        places = list(zip(assignment.ids.ravel().tolist(), assignment.rank.ravel().tolist(), strict=True))
        assert len(set(places)) == 202
