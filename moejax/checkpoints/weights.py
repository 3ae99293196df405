"""The leaves of a model wherever it is, to be read a part at a time: what conversion and export read from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moejax.checkpoints.files import MARK, read_config
from moejax.checkpoints.load import find, pack
from moejax.checkpoints.orbax import OrbaxFolder, is_orbax
from moejax.checkpoints.plan import leaf_paths, make_plan, parts
from moejax.checkpoints.safetensors import Entry, SafetensorsFolder
from moejax.errors import ConfigError
from moejax.models import Decoder, family


@runtime_checkable
class Weights(Protocol):
    """A model's config and leaves."""

    @property
    def hugging_face(self) -> Mapping[str, Any]:
        """Its ``config.json``."""
        ...

    @property
    def folder(self) -> Path | None:
        """Where its tokenizer is, if it is anywhere."""
        ...

    @property
    def leaves(self) -> Mapping[str, Entry]:
        """Shape and dtype of every leaf by its path, in the order of the decoder's tree."""
        ...

    def read(self, part: str) -> dict[str, np.ndarray]:
        """The leaves of a part under their paths, on the host."""
        ...


class HuggingFaceWeights:
    """Those of a Hugging Face folder.

    Args:
        folder: the folder.
        dtype: cast every leaf to it; by default each keeps its own.

    Attributes:
        nonfinite: how many values that are no numbers were met so far, by the tensors' keys.
        nbytes: of a part's tensors in the files.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the tensors do not fit it, or are damaged.
    """

    def __init__(self, folder: Path, dtype: np.dtype | None = None) -> None:
        self.folder: Path | None = folder
        self.hugging_face: Mapping[str, Any] = read_config(folder)
        self.source, self._dtype = SafetensorsFolder(folder), dtype
        kind = family(self.hugging_face.get("model_type"))
        plans = make_plan(Decoder.abstract(kind.config(self.hugging_face)), kind.keys, self.source.entries)
        self._plans = {plan.path: plan for plan in plans}
        self.leaves: Mapping[str, Entry] = {plan.path: Entry(plan.shape, dtype or plan.dtype) for plan in plans}
        self.nonfinite: dict[str, int] = {}

    def read(self, part: str) -> dict[str, np.ndarray]:
        """The leaves of a part, copied: nothing of the files stays in memory."""
        paths = parts(self.leaves)[part]
        return {path: self._plans[path].copy(self.source, self._dtype, self.nonfinite) for path in paths}

    def nbytes(self, part: str) -> int:
        """Bytes of a part's tensors in the files."""
        keys = [key for path in parts(self.leaves)[part] for key in self._plans[path].keys]
        return sum(self.source.entries[key].nbytes for key in keys)


class OrbaxWeights:
    """Those of a folder that ``moejax convert`` wrote.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the leaves do not fit it.
    """

    def __init__(self, folder: Path) -> None:
        self._source = OrbaxFolder(folder)
        self.folder: Path | None = folder
        self.hugging_face: Mapping[str, Any] = self._source.hugging_face
        self.leaves: Mapping[str, Entry] = self._source.leaves

    def read(self, part: str) -> dict[str, np.ndarray]:
        """The leaves of a part."""
        return self._source.restore(part)


@dataclass(frozen=True)
class DecoderWeights:
    """Those of a decoder in memory.

    Raises:
        ConfigError: the config is not that of the decoder.
    """

    decoder: Decoder
    hugging_face: Mapping[str, Any]
    folder: Path | None = None
    leaves: Mapping[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        fields = {key: value for key, value in self.hugging_face.items() if key != MARK}
        kind = family(fields.get("model_type"))
        config = kind.config(fields)
        if (pack(config) if self.decoder.config.is_packed else config) != self.decoder.config.on_mesh(None):
            raise ConfigError(
                "the Hugging Face config is not that of the decoder; what is written would not be read back."
            )
        leaves = {path: Entry(leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaf_paths(self.decoder)}
        object.__setattr__(self, "leaves", leaves)

    def read(self, part: str) -> dict[str, np.ndarray]:
        """The leaves of a part, brought to the host."""
        paths = set(parts(self.leaves)[part])
        return {path: np.asarray(leaf) for path, leaf in leaf_paths(self.decoder) if path in paths}


def open_weights(source: Any) -> Weights:
    """The weights of a folder, a bundled name, a hub id or a loaded model (``moejax.LM``).

    Raises:
        ConfigError: the configuration is not supported, or a loaded model does not have its Hugging Face config.
        CheckpointError: there is no such model, or its weights do not fit its configuration.
    """
    if hasattr(source, "decoder"):
        config = getattr(source, "hugging_face", None)
        if config is None:
            raise ConfigError("this model was not loaded from files, so its Hugging Face config is not known; give it.")
        return DecoderWeights(source.decoder, config)
    folder = find(source)
    return OrbaxWeights(folder) if is_orbax(folder) else HuggingFaceWeights(folder)
