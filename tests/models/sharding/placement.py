"""Where the parts of a model lie, and what devices exchange."""

import math
import re
from collections.abc import Iterator

import jax
import numpy as np
from tiny.four_devices import LAYOUTS, mesh

from moejax.checkpoints.plan import leaf_paths
from moejax.models import Decoder, shardings


def check_parts(spread: Decoder, whole: Decoder, layout: str) -> None:
    """Assert that each device holds its part of every leaf, with the values of the undivided decoder ``whole``."""
    axes, rules = LAYOUTS[layout]
    placed = shardings(whole, mesh(layout), rules)
    for (path, ours), theirs in zip(leaf_paths(spread), jax.tree.leaves(whole), strict=True):
        assert ours.sharding == placed[path], path
        assert len(ours.addressable_shards) == math.prod(axes.values())
        for part in ours.addressable_shards:
            assert part.data.shape == placed[path].shard_shape(theirs.shape), path
            np.testing.assert_array_equal(part.data, theirs[part.index], err_msg=path)


_MESSAGE = re.compile(
    r"= (?P<shapes>.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def messages(program: jax.stages.Compiled) -> Iterator[int]:
    """Yield the number of values of each array that devices exchange in a compiled program."""
    text = program.as_text()
    assert text is not None
    for message in _MESSAGE.finditer(text):
        for shape in _SHAPE.finditer(message["shapes"]):
            yield int(np.prod([int(size) for size in shape[1].split(",") if size]))
