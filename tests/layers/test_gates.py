"""The same gates on every variant: an expert's term, its choice, its share, the shared expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.layers import CASES, B, K, T, make, parameters, tokens

from layers.reference import LIBMOE, PUBLISHED, expert, gelu, relu, shared
from moejax.layers import Call
from moejax.rules import Gates, Reading

pytestmark = pytest.mark.usefixtures("x64")
ORDINARY = [("smoe_sharev3", "libmoe"), ("remoe", None), ("expert_choice", None)]
every_case = pytest.mark.parametrize(
    ("name", "compat"), [case if case in ORDINARY else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
DROPPED = 2


@jax.jit
def run(layer, x, gates):
    return layer.run(x, Call(reading=Reading(gates=gates)))


def ones(layer, **changed) -> Gates:
    """All gates of one layer, that one program serves."""
    fields = {name: jnp.ones((B, T, layer.counts.ids)) for name in ("experts", "selectable", "routing_weights")}
    return Gates(
        **fields | {"shared": jnp.ones((B, T, layer.sizes.num_shared)) if layer.sizes.num_shared else None} | changed
    )


def closed(layer) -> jax.Array:
    return jnp.ones((B, T, layer.counts.ids)).at[..., DROPPED].set(0)


@every_case
def test_gates(name, compat):
    layer, x = make(name, compat), jnp.asarray(tokens())
    p, half = parameters(layer), 0.5 if compat and "share" in name else 1.0
    y, _, aux = run(layer, x, ones(layer))
    ids, weights = np.asarray(aux.routing.ids), np.asarray(aux.routing.weights)
    plain = (LIBMOE if compat else PUBLISHED)[name](p, np.asarray(x), K, np.ones((B, T), bool))
    np.testing.assert_allclose(y, plain.output, rtol=1e-10, atol=1e-10, err_msg="gates of one change nothing")

    term = np.zeros(y.shape)
    for b, t, k in zip(*np.nonzero(ids == DROPPED), strict=True):
        act = relu if name == "sigma_moe" else gelu
        term[b, t] += half * weights[b, t, k] * expert(p, DROPPED, np.asarray(x[b, t]), act)
    assert term.any()
    without, _, same = run(layer, x, ones(layer, experts=closed(layer)))
    np.testing.assert_allclose(without, y - term, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(same.routing.ids, ids)

    other = run(layer, x, ones(layer, selectable=closed(layer)))[2].routing
    assert not ((np.asarray(other.ids) == DROPPED) & (np.asarray(other.weights) != 0)).any()
    assert np.asarray(other.weights).any()
    assert np.isfinite(other.weights).all()

    less = run(layer, x, ones(layer, routing_weights=closed(layer)))[2].routing
    np.testing.assert_array_equal(less.ids, ids)
    assert not np.asarray(less.weights)[ids == DROPPED].any()
    # what is left makes up for it; TC-MoE's signed weights and null routes have no such sum
    left = (np.where(ids == DROPPED, 0, weights) != 0).any(-1)
    if name != "smoe_tcmoe":
        np.testing.assert_allclose(less.weights.sum(-1)[left], weights.sum(-1)[left], rtol=1e-10)

    if layer.sizes.num_shared:
        routed = run(layer, x, ones(layer, shared=jnp.zeros((B, T, 1))))[0]
        np.testing.assert_allclose(y - routed, half * shared(p, np.asarray(x)), rtol=1e-10, atol=1e-10)
