"""Safetensors files: headers first, data only when it is asked for.

Nothing in a header is believed. It may be at most 100 MB, as in the reference implementation, so that a claim of
gigabytes is refused before it is read; its tensors must tile the rest of the file, without overlap and without gaps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from moejax.checkpoints.files import inside, parse_object, read_object
from moejax.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_MAX_HEADER = 100_000_000
_MAX_RANK = 32
_PIECE = 16 << 20
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class Entry:
    """A tensor that a source offers, before its data is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors to load a model from."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Shape and dtype of every tensor."""
        ...

    def read(self, key: str) -> np.ndarray:
        """The data of one tensor; a view where possible."""
        ...


class SafetensorsFile:
    """One file.

    Raises:
        CheckpointError: the file is truncated, damaged, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        header, self._start = _header(path, size)
        header.pop("__metadata__", None)
        tensors = {key: _entry(path, key, item) for key, item in header.items()}
        self._path, self._spans = path, {key: span for key, (_, span) in tensors.items()}
        self.entries: Mapping[str, Entry] = {key: entry for key, (entry, _) in tensors.items()}
        _check_tiling(path, self._spans, size - self._start)

    def read(self, key: str) -> np.ndarray:
        """A read-only view of the mapped file."""
        entry, (begin, _) = self.entries[key], self._spans[key]
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, entry.dtype)
        return np.memmap(self._path, entry.dtype, "r", self._start + begin, entry.shape)

    def copy_to(self, key: str, out: np.ndarray) -> None:
        """Fill the flat array ``out`` with a tensor's values, cast to its dtype.

        Reads instead of mapping: mapped pages count as the process's memory for as long as the system likes.

        Raises:
            CheckpointError: the file became shorter since its header was read.
        """
        entry, step = self.entries[key], _PIECE // self.entries[key].dtype.itemsize
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + self._spans[key][0])
            for first in range(0, out.size, step):
                into = out[first : first + step]
                piece = into if into.dtype == entry.dtype else np.empty(into.shape, entry.dtype)
                if file.readinto(piece.view(np.uint8).data) != piece.nbytes:
                    raise CheckpointError(f"{self._path}: became shorter while it was read.")
                if piece is not into:
                    with np.errstate(over="ignore"):  # what overflows becomes infinite, which callers look for
                        into[...] = piece


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: truncated, or not a safetensors file ({size} bytes, header of {length}).")
        if length > _MAX_HEADER:
            raise CheckpointError(f"{path}: claims a header of {length} bytes; {_MAX_HEADER} is the most there may be.")
        return parse_object(
            file.read(length), f"{path}: not a safetensors file: its header", CheckpointError
        ), 8 + length


def _entry(path: Path, key: str, item: Any) -> tuple[Entry, tuple[int, int]]:
    where = f"{path}: {key!r:.200}"
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise CheckpointError(f"{where} is malformed: it lacks dtype, shape or data_offsets.")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r:.40}; known are {', '.join(DTYPES)}.")
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(f"{where} has shape {shape!r:.80}, which is none.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r:.80}, which are none.")
    entry, span = Entry(tuple(shape), DTYPES[dtype]), (offsets[0], offsets[1])
    # numpy refuses some empty shapes too: the product of the other dimensions must be addressable
    if math.prod(max(size, 1) for size in shape) * entry.dtype.itemsize >= 2**63:
        raise CheckpointError(f"{where} has shape {shape!r:.80}, which no memory holds.")
    if span[1] - span[0] != entry.nbytes:
        raise CheckpointError(
            f"{where} has {span[1] - span[0]} bytes, its shape {shape!r:.80} in {dtype} needs {entry.nbytes}."
        )
    return entry, span


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_tiling(path: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raise ``CheckpointError`` unless the spans cover ``size`` bytes, each once."""
    end = 0
    for key, span in sorted(spans.items(), key=lambda item: item[1]):
        where = f"{path}: {key!r:.200}"
        if span[1] > size:
            raise CheckpointError(f"{where}: truncated: it ends at byte {span[1]} of the data, the file at {size}.")
        if span[0] != end:
            wrong = "overlaps the tensor before it" if span[0] < end else "leaves a gap before it"
            raise CheckpointError(f"{where} {wrong}: it begins at byte {span[0]} of the data, not at {end}.")
        end = span[1]
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to none.")


class SafetensorsFolder:
    """All tensors of a Hugging Face folder: one file, or shards listed by ``model.safetensors.index.json``.

    Raises:
        CheckpointError: a shard is missing, damaged or outside the folder, or lacks a key that the index places there.
    """

    def __init__(self, folder: Path) -> None:
        index = read_object(folder, "model.safetensors.index.json", CheckpointError)
        placed = {} if index is None else _weight_map(folder, index)
        names = sorted(set(placed.values())) if placed else ["model.safetensors"]
        self.paths = {name: inside(folder, name) for name in names}
        missing = [name for name, path in self.paths.items() if path is None]
        if missing:
            raise CheckpointError(_missing(folder, missing) if placed else _no_weights(folder))
        files = {name: SafetensorsFile(path) for name, path in self.paths.items() if path is not None}
        absent = [key for key, name in placed.items() if key not in files[name].entries]
        if absent:
            raise CheckpointError(f"{folder}: the index promises keys that its shards lack: {', '.join(absent[:5])}.")
        self._home: dict[str, SafetensorsFile] = {}
        for name, file in files.items():
            if twice := self._home.keys() & file.entries.keys():
                raise CheckpointError(f"{folder}: {name} repeats keys of other shards: {', '.join(sorted(twice)[:5])}.")
            self._home |= dict.fromkeys(file.entries, file)
        self.entries: Mapping[str, Entry] = {key: file.entries[key] for key, file in self._home.items()}

    def read(self, key: str) -> np.ndarray:
        """A read-only view of the mapped shard."""
        return self._home[key].read(key)

    def copy_to(self, key: str, out: np.ndarray) -> None:
        """As :meth:`SafetensorsFile.copy_to`."""
        self._home[key].copy_to(key, out)


def _weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(
            f"{folder}/model.safetensors.index.json: not a shard index: no 'weight_map' to file names."
        )
    return placed


def _missing(folder: Path, names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}: missing shards: {', '.join(names[:5])}{more}. Download them again."


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not pickles:
        return f"{folder}: no model.safetensors and no model.safetensors.index.json."
    return (
        f"{folder}: only {pickles[0]}, a pickle, which can run any code when it is read, so it is not read here. "
        'Where you trust it, convert it to safetensors: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained('DESTINATION')\"."
    )
