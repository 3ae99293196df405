"""The kernel for the best few scores against ``jax.lax.top_k``; Pallas's interpreter runs it where there is no GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from moejax import get_moe
from moejax.layers import RouterConfig
from moejax.layers.feed_forward.router import Router
from moejax.ops import device as targets
from moejax.ops import top_k
from moejax.ops.device import compute_capability, target
from moejax.rules import Reading

INTERPRET = compute_capability(target()) < 8


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 13]), st.sampled_from([1, 7, 40]), st.data())
def test_the_same_as_sorting(rows, width, data):
    # few shapes, since each compiles a program
    count, seed = data.draw(st.sampled_from([1, min(width, 9)])), data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, width)).astype(np.float32)
    # many are equal, zeros have either sign
    scores = np.round(scores) if data.draw(st.booleans()) else scores
    for value in (-np.inf, np.inf, np.nan):
        scores[rng.random(scores.shape) < data.draw(st.sampled_from([0, 0.1, 0.9]))] = value
    for found, want in zip(
        top_k.top_k_kernel(scores, count, interpret=INTERPRET), jax.lax.top_k(scores, count), strict=True
    ):
        np.testing.assert_array_equal(found, want)


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """As if there were a GPU; the shapes for which the kernel was traced."""
    shapes: list[tuple[int, ...]] = []
    own = top_k.top_k_kernel
    monkeypatch.setattr(targets, "target", lambda *_: SimpleNamespace(compute_capability="9.0"))
    monkeypatch.setattr(
        top_k, "top_k_kernel", lambda x, count: shapes.append(x.shape) or own(x, count, interpret=INTERPRET)
    )
    return shapes


def test_derivatives_are_those_of_the_selected(taken, monkeypatch):
    def kernel(x, *, cuda, default):
        return cuda(x)

    monkeypatch.setattr(top_k.lax, "platform_dependent", kernel)
    scores, weights = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).normal(size=(2, 2, 3, 7)))
    own, plain = (lambda x, f=f: f(x, 3)[0] ** 2 * weights[..., :3] for f in (top_k.top_k, jax.lax.top_k))
    for derivative in (jax.jacrev, jax.jacfwd):
        np.testing.assert_allclose(derivative(own)(scores), derivative(plain)(scores), rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(lambda x: top_k.top_k(x, 3)[1])(scores), jax.lax.top_k(scores, 3)[1])
    assert taken


def test_who_takes_the_kernel(taken, monkeypatch):
    scores = jnp.arange(12.0).reshape(2, 6)
    # on a CPU the program is what it was
    for found, want in zip(jax.jit(lambda x: top_k.top_k(x, 2))(scores), jax.lax.top_k(scores, 2), strict=True):
        np.testing.assert_array_equal(found, want)
    assert taken == [(2, 6)]
    jax.eval_shape(lambda x: top_k.top_k(x, 2), scores.astype(jnp.bfloat16))
    for shape, count in (((1, 1024), 2), ((1, 64), 33), ((0, 6), 2)):
        jax.eval_shape(lambda x, count=count: top_k.top_k(x, count), jnp.zeros(shape))
    two = Mesh(np.array(jax.devices()[:1] * 2), ("tensor",))
    jax.eval_shape(lambda x: top_k.top_k(x, 2, two), scores)
    one = Mesh(np.array(jax.devices()[:1]), ("expert",))
    spec = PartitionSpec("expert")
    jax.eval_shape(jax.shard_map(lambda x: top_k.top_k(x, 2), mesh=one, in_specs=spec, out_specs=spec), scores)
    monkeypatch.setattr(targets, "find_spec", lambda _: None)
    jax.eval_shape(lambda x: top_k.top_k(x, 2), scores)
    assert taken == [(2, 6)]


def test_routers_take_it(taken):
    router = Router.init(jax.random.key(0), RouterConfig(6, 2), 8, "float32")
    jax.eval_shape(lambda x: router(x, Reading())[0], jnp.zeros((1, 3, 8)))
    layer = get_moe("smoe")(8, 8, num_of_experts=5, num_selected=2)
    jax.eval_shape(lambda x: layer(x)[0], jnp.zeros((1, 3, 8)))
    assert taken == [(1, 3, 6), (1, 3, 5)]
