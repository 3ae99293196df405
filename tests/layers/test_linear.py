"""The linear map: what its gradient computes."""

import jax
import jax.numpy as jnp
import pytest

from moejax.layers.linear import matmul

pytestmark = pytest.mark.fast


def test_weights_that_are_held_constant_cost_no_product():
    """Relevance reads gates through every map; a product for a gradient of the weights would double its work."""
    first, second = jnp.ones((5, 3)), jnp.ones((4, 3))

    def read(x):
        return jnp.sin(matmul(x, first)).sum() + jnp.cos(matmul(x, second)).sum()

    assert str(jax.make_jaxpr(jax.grad(read))(jnp.ones((7, 3)))).count("dot_general[") == 4


def test_gradients_of_weights_that_are_not():
    x, weight = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(4, 3)
    found = jax.grad(lambda weight: (matmul(x, weight) ** 2).sum())(weight)
    assert jnp.allclose(found, jax.grad(lambda weight: ((x @ weight.T) ** 2).sum())(weight))
