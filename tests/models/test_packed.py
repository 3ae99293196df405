"""A packed decoder is the decoder, in fewer arrays."""

import jax
import numpy as np
import pytest
from families.build import CONFIGS, loaded

from moejax.models import Packed, unpack


@pytest.mark.parametrize("family", CONFIGS)
def test_comes_back_whole(family: str) -> None:
    decoder = loaded(family).decoder
    back = unpack(Packed.of(decoder))
    assert jax.tree.structure(back) == jax.tree.structure(decoder)
    jax.tree.map(np.testing.assert_array_equal, back, decoder)


def test_alike_vectors_of_a_layer_come_together() -> None:
    decoder = loaded("olmoe").decoder
    saved = 0
    for layer in decoder.layers:
        vectors = [leaf.shape for leaf in jax.tree.leaves(layer) if leaf.ndim == 1]
        saved += len(vectors) - len(set(vectors))
    assert saved >= 2 * len(decoder.layers), "the model has too few alike vectors to show it"
    assert len(Packed.of(decoder).arrays) == len(jax.tree.leaves(decoder)) - saved


def test_config_without_unpacking() -> None:
    decoder = loaded("jetmoe").decoder
    assert Packed.of(decoder).config == decoder.config


def test_packing_anew_compiles_nothing_anew() -> None:
    decoder = loaded("gpt_oss").decoder
    one, other = Packed.of(decoder), Packed.of(decoder)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(one.structure) == hash(other.structure)
    assert jax.tree.structure(one) != jax.tree.structure(Packed.of(loaded("olmoe").decoder))
