"""Functions that change cotangents: they keep values and do to cotangents exactly what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.ops.cotangents import elementwise, elementwise_identity, gate, probe, scale_cotangent

B, T, D, N = 2, 7, 5, 3


def normal(*shape: int, seed: int = 0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


class TestScaleCotangent:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("factor", [0.25, 0.5, -2.0, 0.0])
    def test_value_kept_cotangent_scaled(self, dtype, factor):
        x, c = normal(T, D, dtype=dtype), normal(T, D, seed=1, dtype=dtype)
        y, pull = jax.vjp(lambda x: scale_cotangent(x, factor), x)
        np.testing.assert_array_equal(y, x)
        (back,) = pull(c)
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, c * factor)

    def test_under_jit_and_vmap(self):
        x, cs = normal(T, D), normal(N, T, D, seed=1)
        pull = jax.vjp(jax.jit(lambda x: scale_cotangent(x, 0.5)), x)[1]
        np.testing.assert_array_equal(jax.vmap(pull)(cs)[0], 0.5 * cs)


@st.composite
def broadcastable(draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    return shape, tuple(draw(st.sampled_from([1, n])) for n in shape)


class TestGate:
    @settings(max_examples=25, deadline=None)
    @given(broadcastable())
    def test_equals_calculus_whatever_broadcasts(self, shapes):
        """A gate's cotangent, its relevance, is the derivative of ``x * g`` with respect to it."""
        shape, gate_shape = shapes
        x, g, c = normal(*shape), normal(*gate_shape, seed=1), normal(*shape, seed=2)
        y, pull = jax.vjp(gate, x, g)
        want, calculus = jax.vjp(lambda x, g: x * g, x, g)
        np.testing.assert_array_equal(y, want)
        for a, b in zip(pull(c), calculus(c), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_ones_change_no_bit_and_zeros_switch_off(self):
        x, c = normal(T, D, dtype=jnp.bfloat16), normal(T, D, seed=1, dtype=jnp.bfloat16)
        y, pull = jax.vjp(lambda x: gate(x, jnp.ones((T, 1))), x)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(pull(c)[0], c)
        y, pull = jax.vjp(lambda x: gate(x, jnp.zeros((T, 1))), x)
        assert not np.asarray(y, np.float32).any()
        assert not np.asarray(pull(c)[0], np.float32).any()

    def test_bfloat16_relevance_is_multiplied_and_summed_in_float32(self):
        # in bfloat16 a running sum of ones stops at 256, and the square of this number loses its last term
        number = 1 + 2**-7
        x = jnp.full((1, 4096), number, jnp.bfloat16)
        y, pull = jax.vjp(gate, x, jnp.ones((1, 1)))
        of_x, of_gate = pull(jnp.full((1, 4096), number, jnp.bfloat16))
        assert y.dtype == of_x.dtype == jnp.bfloat16
        assert of_gate.dtype == jnp.float32
        assert of_gate.item() == 4096 * number**2

    def test_gate_multiplies_in_float32(self):
        """A gate between the steps of bfloat16 is not rounded before it multiplies."""
        x, g = jnp.full((1, 1), 3.0, jnp.bfloat16), jnp.full((1, 1), 1 + 2**-9)
        assert gate(gate(x, g), jnp.full((1, 1), 257 / 3)).item() == jnp.bfloat16(257.0)
        assert gate(jnp.full((1, 1), 128.0, jnp.bfloat16), jnp.full((1, 1), 1.99)).item() == jnp.bfloat16(128 * 1.99)

    def test_vmap_over_cotangents_and_over_inputs(self):
        x, g, cs = normal(T, D), normal(T, 1, seed=1), normal(N, T, D, seed=2)
        pull = jax.vjp(gate, x, g)[1]
        many = jax.vmap(pull)(cs)
        for n in range(N):
            for a, b in zip(many, pull(cs[n]), strict=True):
                np.testing.assert_allclose(a[n], b, rtol=1e-6)
        xs, gs = normal(N, T, D, seed=3), normal(N, T, 1, seed=4)
        np.testing.assert_array_equal(jax.vmap(gate)(xs, gs), xs * gs)
        of_gates = jax.vmap(lambda x, g, c: jax.vjp(gate, x, g)[1](c)[1])(xs, gs, cs)
        np.testing.assert_allclose(of_gates, (xs * cs).sum(-1, keepdims=True), rtol=1e-5, atol=1e-6)

    def test_wrong_number_of_axes(self):
        with pytest.raises(ValueError, match="zip"):
            jax.grad(lambda g: gate(normal(T, D), g).sum())(jnp.ones(D))


class TestProbe:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_books_relevance_of_each_batch_row(self, sign):
        x, c = normal(B, T, D), normal(B, T, D, seed=1)
        y, pull = jax.vjp(lambda x, entry: probe(x, entry, sign), x, jnp.zeros(B))
        np.testing.assert_array_equal(y, x)
        of_x, entry = pull(c)
        np.testing.assert_array_equal(of_x, c)
        np.testing.assert_allclose(entry, sign * (x * c).sum((1, 2)), rtol=1e-5)

    def test_entries_add_up(self):
        x, c = normal(B, T), normal(B, T, seed=1)

        def twice(entry):
            return probe(probe(x, entry, 1.0) * 3, entry, -1.0)

        (entry,) = jax.vjp(twice, jnp.zeros(B))[1](c)
        np.testing.assert_allclose(entry, jnp.zeros(B), atol=1e-5)

    def test_bfloat16_is_summed_in_float32_and_vmap(self):
        x = jnp.ones((B, 4096), jnp.bfloat16)
        pull = jax.vjp(lambda entry: probe(x, entry, 1.0), jnp.zeros(B))[1]
        scale = jnp.arange(1, N + 1, dtype=jnp.bfloat16)[:, None, None]
        (entry,) = jax.vmap(pull)(scale * x)
        np.testing.assert_array_equal(entry, 4096.0 * np.arange(1, N + 1)[:, None] * np.ones(B))


class TestElementwise:
    @staticmethod
    def unit(g, u):
        return g * jax.nn.sigmoid(g) * (u + 1)

    @pytest.mark.parametrize("count", [1, 2])
    def test_equals_calculus(self, count):
        function = self.unit if count == 2 else jnp.tanh
        xs, c = [normal(T, D, seed=i) for i in range(count)], normal(T, D, seed=3)
        want, calculus = jax.vjp(function, *xs)
        y, pull = jax.vjp(lambda *xs: elementwise(function, *xs), *xs)
        np.testing.assert_array_equal(y, want)
        for found, expected in zip(pull(c), calculus(c), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_rules_inside(self):
        x, c = normal(T, D), normal(T, D, seed=1)
        (found,) = jax.vjp(lambda x: elementwise(lambda x: scale_cotangent(x, 0.5), x), x)[1](c)
        np.testing.assert_array_equal(found, 0.5 * c)

    def test_several_cotangents_share_what_they_are_multiplied_by(self):
        g, u, cs = normal(T, D), normal(T, D, seed=1), normal(N, T, D, seed=2)
        pull = jax.vmap(jax.vjp(lambda g, u: elementwise(self.unit, g, u), g, u)[1])
        steps = jax.make_jaxpr(pull)(cs).jaxpr.eqns
        made_for_each = {str(e.primitive) for e in steps if e.outvars[0].aval.shape == (N, T, D)}
        assert made_for_each == {"mul"}
        assert any(str(e.primitive) == "optimization_barrier" for e in steps)

    def test_second_derivatives(self):
        x = normal(D)
        found, want = (jax.hessian(lambda x, f=f: f(x, 2 * x).sum(), argnums=0) for f in (self.elementwise, self.unit))
        np.testing.assert_allclose(found(x), want(x), rtol=1e-4, atol=1e-5)

    def elementwise(self, g, u):
        return elementwise(self.unit, g, u)


class TestElementwiseIdentity:
    def test_relevance_goes_through_unchanged(self):
        x, c = 2 * normal(T, D), normal(T, D, seed=1)
        y, pull = jax.vjp(lambda x: elementwise_identity(x, jnp.clip(x, -1, 1)), x)
        np.testing.assert_array_equal(y, jnp.clip(x, -1, 1))
        assert (np.abs(np.asarray(x)) > 1).any(), "some must saturate"
        (back,) = pull(c)
        np.testing.assert_allclose(x * back, y * c, rtol=1e-6)
        assert (jnp.abs(back) <= jnp.abs(c)).all(), "a clamp never enlarges a cotangent"

    def test_zero_passes_its_cotangent(self):
        (back,) = jax.vjp(lambda x: elementwise_identity(x, jnp.clip(x, -1, 1)), jnp.zeros(D))[1](jnp.ones(D))
        np.testing.assert_array_equal(back, jnp.ones(D))

    def test_second_argument_gets_nothing(self):
        x, y = normal(T), normal(T, seed=1)
        np.testing.assert_array_equal(jax.grad(lambda y: elementwise_identity(x, y).sum())(y), jnp.zeros(T))

    def test_dtype_and_vmap(self):
        x, cs = normal(T, D, dtype=jnp.bfloat16), normal(N, T, D, seed=1, dtype=jnp.bfloat16)
        pull = jax.vjp(lambda x: elementwise_identity(x, x / 2), x)[1]
        (back,) = jax.vmap(pull)(cs)
        assert back.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back, cs / 2)
