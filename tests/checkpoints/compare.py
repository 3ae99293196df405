"""Compare decoders leaf by leaf, and folders tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from moejax.checkpoints.safetensors import SafetensorsFolder
from moejax.models import Decoder


def raw(folder: Path) -> dict[str, tuple]:
    """Return dtype, shape and bytes of every tensor of a folder."""
    source = SafetensorsFolder(folder)
    return {k: (str(e.dtype), e.shape, source.read(k).tobytes()) for k, e in source.entries.items()}


def as_bytes(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple]:
    """Return dtype, shape and bytes of tensors that were read without moejax."""
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in tensors.items()}


def same_leaves(a: Decoder, b: Decoder) -> bool:
    """Return whether all leaves of two decoders have the same dtypes and the same bytes."""
    one, other = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(one) == len(other)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(one, other, strict=True)
    )


def assert_same(a: Decoder, b: Decoder) -> None:
    """Assert that two decoders have the same structure, dtypes and values; the message names the leaf that differs."""
    assert jax.tree.structure(a) == jax.tree.structure(b), "architectures differ"
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert np.array_equal(x, y), f"{jax.tree_util.keystr(path)} differs"
