"""Readers of a model's leaves, one part of the model at a time, wherever the model is.

Conversion and export read from these. A reader differs from a ``TensorSource``, which has tensors under their published
keys: a reader has the decoder's leaves under their paths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moejax.checkpoints.files import MARK
from moejax.checkpoints.folder import ModelFolder, open_folder
from moejax.checkpoints.load import pack
from moejax.checkpoints.orbax import OrbaxFolder
from moejax.checkpoints.plan import LeafPlan, PackedPlan, leaf_paths, make_plan, parts
from moejax.checkpoints.safetensors import Entry, SafetensorsFolder
from moejax.checkpoints.tied_head import with_stored_head
from moejax.errors import ConfigError
from moejax.models import Decoder, family


@runtime_checkable
class CheckpointReader(Protocol):
    """The config and the leaves of a model."""

    @property
    def hugging_face(self) -> Mapping[str, Any]:
        """The fields of its ``config.json``."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder with its tokenizer; ``None`` if the model is in memory."""
        ...

    @property
    def leaves(self) -> Mapping[str, Entry]:
        """Shape and dtype of every leaf by its path, in the order of the decoder's tree."""
        ...

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        """The dtypes in which to write tensors that do not have their leaf's, by their keys."""
        ...

    def read(self, part: str) -> dict[str, np.ndarray]:
        """Read the leaves of a part (:func:`moejax.checkpoints.plan.part_of`) to the host, by their paths."""
        ...


class HuggingFaceReader:
    """Reads the leaves of a folder of Hugging Face files.

    Args:
        folder: the folder.
        dtype: cast every leaf to it; by default each keeps the dtype of its tensors.

    Attributes:
        source: the folder's tensors.
        dtypes: the dtype of each tensor that is narrower than its leaf's, by its key.
        nonfinite: the number of NaN and infinite values in the parts that were read, by the keys of their tensors.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the tensors do not fit it, or are damaged.
    """

    def __init__(self, folder: ModelFolder, dtype: np.dtype | None = None) -> None:
        self.folder: Path | None = folder.path
        self.source, self._dtype = folder.tensors(), dtype
        kind = family(folder.hugging_face.get("model_type"))
        self.hugging_face: Mapping[str, Any] = with_stored_head(folder.hugging_face, kind, self.source)
        plans = make_plan(Decoder.abstract(kind.config(self.hugging_face)), kind.keys, self.source.entries)
        self._plans = {plan.path: plan for plan in plans}
        self.leaves: Mapping[str, Entry] = {plan.path: Entry(plan.shape, dtype or plan.dtype) for plan in plans}
        self.dtypes: Mapping[str, np.dtype] = {} if dtype else _narrower(plans, self.source)
        self.nonfinite: dict[str, int] = {}

    def read(self, part: str) -> dict[str, np.ndarray]:
        """Read the leaves of a part as copies, so that nothing of the files stays in memory."""
        paths = parts(self.leaves)[part]
        return {path: self._plans[path].copy(self.source, self._dtype, self.nonfinite) for path in paths}

    def nbytes(self, part: str) -> int:
        """Return the number of bytes that a part's tensors have in the files."""
        keys = [key for path in parts(self.leaves)[part] for key in self._plans[path].keys]
        return sum(self.source.entries[key].nbytes for key in keys)


def _narrower(plans: list[LeafPlan | PackedPlan], source: SafetensorsFolder) -> dict[str, np.dtype]:
    """The dtypes of tensors that differ from their leaf's, by their keys."""
    whole = [plan for plan in plans if isinstance(plan, LeafPlan)]
    dtypes = {key: (source.entries[key].dtype, plan.dtype) for plan in whole for key in plan.keys}
    return {key: stored for key, (stored, of_leaf) in dtypes.items() if stored != of_leaf}


class OrbaxReader:
    """Reads the leaves of a folder that ``moejax convert`` wrote.

    Raises:
        ConfigError: the configuration is not supported, or the folder's format is not.
        CheckpointError: the leaves do not fit it.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._stored = OrbaxFolder(folder)
        self.folder: Path | None = folder.path
        self.hugging_face: Mapping[str, Any] = folder.hugging_face
        self.leaves: Mapping[str, Entry] = self._stored.leaves
        self.dtypes: Mapping[str, np.dtype] = {}

    def read(self, part: str) -> dict[str, np.ndarray]:
        """Read the leaves of a part."""
        return self._stored.restore(part)


@dataclass(frozen=True)
class DecoderReader:
    """Reads the leaves of a decoder in memory.

    Attributes:
        decoder: the decoder.
        hugging_face: the fields of the Hugging Face config that describes it.
        folder: the folder with its tokenizer, if there is one.
        dtypes: the dtypes in which to write leaves and tensors, by their paths and keys; by default the leaves' own.
        leaves: shape and dtype of every leaf by its path.

    Raises:
        ConfigError: the Hugging Face config describes another decoder.
    """

    decoder: Decoder
    hugging_face: Mapping[str, Any]
    folder: Path | None = None
    dtypes: Mapping[str, np.dtype] = field(default_factory=dict)
    leaves: Mapping[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        fields = {key: value for key, value in self.hugging_face.items() if key != MARK}
        kind = family(fields.get("model_type"))
        config = kind.config(fields)
        if (pack(config) if self.decoder.config.is_packed else config) != self.decoder.config.on_mesh(None):
            raise ConfigError(
                "the Hugging Face config does not describe this decoder; the written files would not load again."
            )
        dtypes = {path: self.dtypes.get(path, np.dtype(leaf.dtype)) for path, leaf in leaf_paths(self.decoder)}
        leaves = {path: Entry(leaf.shape, dtypes[path]) for path, leaf in leaf_paths(self.decoder)}
        object.__setattr__(self, "leaves", leaves)

    def read(self, part: str) -> dict[str, np.ndarray]:
        """Copy the leaves of a part to the host."""
        paths = set(parts(self.leaves)[part])
        found = {path: np.asarray(leaf) for path, leaf in leaf_paths(self.decoder) if path in paths}
        return {path: leaf.astype(self.leaves[path].dtype, copy=False) for path, leaf in found.items()}


def open_reader(source: Any) -> CheckpointReader:
    """Open a model for reading.

    Args:
        source: a folder, a bundled name, a hub id or a loaded model (``moejax.LM``).

    Raises:
        ConfigError: the configuration is not supported, or a loaded model does not have its Hugging Face config.
        CheckpointError: there is no such model, or its weights do not fit its configuration.
    """
    if hasattr(source, "decoder"):
        config = getattr(source, "hugging_face", None)
        if config is None:
            raise ConfigError(
                "this model was not loaded from files, so its Hugging Face config is not known; set its hugging_face."
            )
        return DecoderReader(source.decoder, config, dtypes=getattr(source, "stored_dtypes", {}))
    folder = open_folder(source)
    return OrbaxReader(folder) if folder.is_orbax else HuggingFaceReader(folder)
