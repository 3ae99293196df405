"""Every implementation of the grouped expert matmul against a loop over slots in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slots import expert_matmul, ids_with_load

from moejax.ops.experts import assign, capacities, grouped_matmul, permute, register_matmul
from moejax.ops.experts.matmul import api, hopper, packed
from moejax.ops.experts.matmul.registry import MATMULS
from moejax.ops.mxfp4 import MXFP4

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
    gradient = api._weight_gradient
    monkeypatch.setattr(api, "_weight_gradient", lambda *args: asked.append(1) or gradient(*args))
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
        def product(x):
            return expert_matmul(x, weight, assign(ids, 40), implementation="padded")

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

    def product(x):
        return expert_matmul(x, jnp.asarray(weight), assignment, implementation=implementation)

    (dx,) = jax.vjp(product, jnp.asarray(x))[1](cotangents[0])
    np.testing.assert_allclose(dx, by_loop(x, weight, ids, cotangents)[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("implementation", "by_expert"), [("padded", False), ("gather", True)])
def test_rows_in_another_order_are_refused(implementation, by_expert):
    assignment = assign(jnp.zeros((3, 1), int), 2, by_expert=by_expert)
    with pytest.raises(ValueError, match=f"{implementation!r} is not for rows with by_expert={by_expert}"):
        grouped_matmul(
            jnp.ones((len(assignment.row_to_slot), D)), jnp.ones((2, M, D)), assignment, implementation=implementation
        )


def test_narrow_rows_and_wide_weights():
    """Also where the loads need several passes, whose sums are carried."""
    ids = jnp.zeros((301, 1), jnp.int32)
    rows = expert_matmul(jnp.ones((301, 1, D), jnp.bfloat16), jnp.ones((20, M, D)), assign(ids, 20))
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, D)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="'dense' is unknown; choose from"):
        expert_matmul(
            jnp.ones((1, 1, D)), jnp.ones((2, M, D)), assign(jnp.zeros((1, 1), int), 2), implementation="dense"
        )


@pytest.fixture
def registered():
    """The table of implementations, from which all that a test registers is removed in the end."""
    with MATMULS.restored():
        yield MATMULS


class TestRegistration:
    def operands(self, by_expert=True):
        assignment = assign(jnp.array([[0, 2], [2, 1], [3, 0]]), 4, by_expert=by_expert)
        x, weight, _ = operands(np.asarray(assignment.ids), 4, shared=False)
        return permute(jnp.asarray(x), assignment), jnp.asarray(weight), assignment

    @pytest.mark.usefixtures("registered")
    def test_from_outside_of_the_package(self):
        """By name if its priority is low, by default if it is high; its gradients come with it."""

        @register_matmul("double", priority=0, by_expert=True)
        def double(x, weight, assignment, transpose):
            return 2 * MATMULS["padded"].product(x, weight, assignment, transpose)

        x, weight, assignment = self.operands()
        plain = jax.vjp(lambda x: grouped_matmul(x, weight, assignment), x)
        twice = jax.vjp(lambda x: grouped_matmul(x, weight, assignment, implementation="double"), x)
        np.testing.assert_array_equal(twice[0], 2 * plain[0])
        np.testing.assert_array_equal(twice[1](plain[0])[0], 2 * plain[1](plain[0])[0])
        with pytest.raises(ValueError, match="'double' is not for rows with by_expert=False"):
            grouped_matmul(*self.operands(by_expert=False), implementation="double")
        register_matmul("large", priority=99, supports=lambda x, weight, assignment: len(weight) > 4)(double)
        np.testing.assert_array_equal(grouped_matmul(x, weight, assignment), plain[0])
        register_matmul("small", priority=99, supports=lambda x, weight, assignment: len(weight) == 4)(double)
        np.testing.assert_array_equal(grouped_matmul(x, weight, assignment), twice[0])

    def test_removed_afterwards(self):
        assert set(MATMULS) == {"gather", "padded", "hopper", "packed"}

    @pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
    @pytest.mark.parametrize("by_expert", [True, False], ids=["by-expert", "by-slot"])
    @pytest.mark.parametrize("mxfp4", [True, False], ids=["mxfp4", "float"])
    def test_default_choice(self, monkeypatch, kernels, by_expert, mxfp4):
        """Kernels first, the one for MXFP4 before the other; without them by the order of rows."""
        monkeypatch.setattr(MATMULS["packed"], "supports", lambda *_: kernels)
        monkeypatch.setattr(MATMULS["hopper"], "supports", lambda *_: kernels)
        x, weight, assignment = self.operands(by_expert)
        weight = jax.eval_shape(lambda: MXFP4.random(jax.random.key(0), (4, M, 32))) if mxfp4 else weight
        by_rows = ("hopper" if kernels else "padded") if by_expert else "gather"
        expected = "packed" if kernels and mxfp4 else by_rows
        assert api._default_implementation(x, weight, assignment) == expected

    def test_kernels_say_themselves_what_they_support(self):
        assert MATMULS["packed"].supports is packed.supports
        assert MATMULS["hopper"].supports is hopper.supports
