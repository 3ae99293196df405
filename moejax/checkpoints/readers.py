"""Readers of a model's leaves, one part of the model at a time, wherever the model is.

Conversion and export read from these. A reader differs from a ``TensorSource``, which has tensors under their published
keys: a reader has the decoder's leaves under their paths.
"""

from collections.abc import Iterator, Mapping
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
from moejax.ops.packed import FORMATS, is_packed


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
        plans = make_plan(Decoder.abstract(kind.config(self.hugging_face)), kind, self.source.entries)
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
        dequantise: packed matrices are read as their values, in the dtype of the decoder's embedding.
        leaves: shape and dtype of every leaf by its path.

    Raises:
        ConfigError: the Hugging Face config describes another decoder; or the decoder holds experts in a format that is
            never published, and ``dequantise`` is not given.
    """

    decoder: Decoder
    hugging_face: Mapping[str, Any]
    folder: Path | None = None
    dtypes: Mapping[str, np.dtype] = field(default_factory=dict)
    dequantise: bool = False
    leaves: Mapping[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        fields = {key: value for key, value in self.hugging_face.items() if key != MARK}
        kind = family(fields.get("model_type"))
        config = kind.config(fields)
        packed = self.decoder.config.packed
        if (pack(config, packed) if packed else config) != self.decoder.config.on_mesh(None):
            raise ConfigError(
                "the Hugging Face config does not describe this decoder; the written files would not load again."
            )
        if packed and not self.dequantise and not FORMATS[packed].is_published:
            raise ConfigError(
                f"experts held as {packed} have lost digits, and no software for this family reads them; "
                "export(.., dequantise=True) writes what is left of them in full (--dequantise on the command line)."
            )
        whole = np.dtype(self.decoder.dtype)
        leaves = {
            path: Entry(leaf.shape, self.dtypes.get(path, whole if is_packed(leaf) else np.dtype(leaf.dtype)))
            for path, leaf in self._matrices()
        }
        object.__setattr__(self, "leaves", leaves)

    def _matrices(self) -> Iterator[tuple[str, Any]]:
        """Yield the leaves by their paths; packed matrices as a whole if they are to be unpacked."""
        return leaf_paths(self.decoder, is_leaf=is_packed if self.dequantise else None)

    def read(self, part: str) -> dict[str, np.ndarray]:
        """Copy the leaves of a part to the host."""
        paths, dtype = set(parts(self.leaves)[part]), self.decoder.dtype
        found = {
            path: np.asarray(leaf.unpack(dtype) if is_packed(leaf) else leaf)
            for path, leaf in self._matrices()
            if path in paths
        }
        return {path: leaf.astype(self.leaves[path].dtype, copy=False) for path, leaf in found.items()}


def open_reader(source: Any, *, dequantise: bool = False) -> CheckpointReader:
    """Open a model for reading.

    Args:
        source: a folder, a bundled name, a hub id or a loaded model (``moejax.LM``).
        dequantise: read packed matrices of a loaded model as their values; those of files always are.

    Raises:
        ConfigError: the configuration is not supported, a loaded model does not have its Hugging Face config, or it was
            quantised and ``dequantise`` is not given.
        CheckpointError: there is no such model, or its weights do not fit its configuration.
    """
    if hasattr(source, "decoder"):
        config = getattr(source, "hugging_face", None)
        if config is None:
            raise ConfigError(
                "this model was not loaded from files, so its Hugging Face config is not known; set its hugging_face."
            )
        return DecoderReader(source.decoder, config, dtypes=getattr(source, "stored_dtypes", {}), dequantise=dequantise)
    folder = open_folder(source)
    return OrbaxReader(folder) if folder.is_orbax else HuggingFaceReader(folder)
