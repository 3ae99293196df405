"""A reading, cut into those of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.rules import AttnLRP, Gates, Reading

pytestmark = pytest.mark.fast

L, B, T, E = 3, 2, 5, 4


def test_by_layer_is_each_layer_of_the_whole() -> None:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape))

    # of experts one array for all layers
    gates = Gates(tokens=draw(L + 1, B, T), experts=draw(1, B, T, E), attention=draw(L, B, T))
    taps = {"stream.1": draw(B, T), "neurons.0": draw(B, T), "stream.-1": draw(B, T)}
    whole = Reading(AttnLRP(), gates, {"softmax": draw(L + 1, B, T)}, taps)
    cut = whole.by_layer(L)
    assert len(cut) == L + 1
    for layer, found in zip((*range(L), -1), cut, strict=True):
        want = whole.for_layer(layer)
        assert jax.tree.structure(found) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, found, want)
    assert set(cut[1].taps) == {"stream"}
    np.testing.assert_array_equal(cut[-1].gates.tokens, gates.tokens[L])
    np.testing.assert_array_equal(cut[-1].probes["softmax"], whole.probes["softmax"][L, :, 0])
