"""A packed decoder is the decoder, in fewer arrays."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny.hugging_face import CONFIGS, loaded

from moejax.models import FlatDecoder, unflatten


@pytest.mark.parametrize("family", CONFIGS)
def test_comes_back_whole(family: str) -> None:
    decoder = loaded(family).decoder
    back = unflatten(FlatDecoder.of(decoder))
    assert jax.tree.structure(back) == jax.tree.structure(decoder)
    jax.tree.map(np.testing.assert_array_equal, back, decoder)


@pytest.mark.parametrize(("family", "vectors", "biases"), [("olmoe", 4, 0), ("gpt_oss", 5, 3)])
def test_a_layers_vectors_and_biases_come_together(family: str, vectors: int, biases: int) -> None:
    decoder = loaded(family).decoder
    for layer in decoder.layers:
        assert sum(leaf.ndim == 1 for leaf in jax.tree.leaves(layer)) == vectors, "the family has changed"
    saved = (vectors + biases - 1) * len(decoder.layers)
    assert len(FlatDecoder.of(decoder).arrays) == len(jax.tree.leaves(decoder)) - saved


def test_layers_have_theirs_at_the_same_places() -> None:
    """So that what is compiled for one layer serves all."""
    packed = FlatDecoder.of(loaded("gpt_oss").decoder)
    joined = [[place.shape for place in group] for group in packed.structure.places if len(group) > 1]
    assert len(joined) == packed.config.num_layers
    assert all(shapes == joined[0] for shapes in joined)


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_vectors_elsewhere_stay_there(kind: str) -> None:
    leaves, tree = jax.tree.flatten(loaded("olmoe").decoder)
    moved = next(i for i, leaf in enumerate(leaves) if leaf.ndim == 1)
    there = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec(), memory_kind=kind)
    leaves[moved] = jax.device_put(leaves[moved], there)
    back = jax.tree.leaves(unflatten(FlatDecoder.of(tree.unflatten(leaves))))
    assert back[moved].sharding == there
    jax.tree.map(np.testing.assert_array_equal, back, leaves)


def test_config_without_unpacking() -> None:
    decoder = loaded("jetmoe").decoder
    packed = FlatDecoder.of(decoder)
    assert packed.config == decoder.config
    # read once, since every call asks for it
    assert packed.config is packed.config


def test_packing_anew_compiles_nothing_anew() -> None:
    decoder = loaded("gpt_oss").decoder
    one, other = FlatDecoder.of(decoder), FlatDecoder.of(decoder)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(one.structure) == hash(other.structure)
    assert jax.tree.structure(one) != jax.tree.structure(FlatDecoder.of(loaded("olmoe").decoder))
