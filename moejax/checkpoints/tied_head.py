"""Checkpoints that store an output head beside the embedding that it is tied to.

Savers of sharded and distributed models write both. Equal numbers are read once. Where they differ, the config is
wrong and the head that is stored counts, as in transformers.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.checkpoints.plan import leaf_keys
from moejax.checkpoints.safetensors import TensorSource
from moejax.models import Decoder, Family

_ROWS = 1024
"""The number of rows that are compared at a time."""


def with_stored_head(hugging_face: Mapping[str, Any], kind: Family, source: TensorSource) -> Mapping[str, Any]:
    """Return the fields of a config, with ``tie_word_embeddings`` off if a head of other numbers is stored.

    Args:
        hugging_face: the fields of ``config.json``.
        kind: the model's family.
        source: its tensors.

    Raises:
        ConfigError: the configuration is not supported.
    """
    config = kind.config(hugging_face)
    if not config.tied or "head" not in kind.keys or "embedding" not in kind.keys:
        return hugging_face
    shape = config.vocab_size, config.model_dim
    head, embedding = (
        [key for key in leaf_keys(kind.keys, path, shape) if key in source.entries] for path in ("head", "embedding")
    )
    if not head or not embedding or _equal(source.read(head[0]), source.read(embedding[0])):
        return hugging_face
    warnings.warn(
        f"the config ties the output head to the embedding, but {head[0]} holds other numbers and is used.",
        stacklevel=2,
    )
    return {**hugging_face, "tie_word_embeddings": False}


def config_as_read(hugging_face: Mapping[str, Any], decoder: Decoder) -> Mapping[str, Any]:
    """Return the config of the files, with the head untied where the files have one of its own."""
    if decoder.config.tied or not hugging_face.get("tie_word_embeddings"):
        return hugging_face
    return {**hugging_face, "tie_word_embeddings": False}


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare two tensors a few rows at a time, since they may be mapped files larger than memory."""
    if one.shape != other.shape:
        return False
    return all(np.array_equal(one[i : i + _ROWS], other[i : i + _ROWS]) for i in range(0, len(one), _ROWS))
