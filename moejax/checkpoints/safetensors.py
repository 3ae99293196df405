"""Safetensors files as memory-mapped arrays: headers first, data only when it is asked for."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

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


@dataclass(frozen=True)
class Entry:
    """A tensor that a source offers, before its data is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


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
    """One file, memory-mapped.

    Raises:
        CheckpointError: the file is truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        header, self._start = _header(path, size)
        self._path, self._spans = path, {}
        entries = {}
        for key, item in header.items():
            if key == "__metadata__":
                continue
            entry, span = _entry(path, key, item)
            if self._start + span[1] > size:
                raise CheckpointError(
                    f"{path}: truncated: {key} ends at byte {self._start + span[1]}, the file at {size}."
                )
            entries[key], self._spans[key] = entry, span
        self.entries: Mapping[str, Entry] = entries

    def read(self, key: str) -> np.ndarray:
        """A read-only view of the mapped file."""
        entry, (begin, _) = self.entries[key], self._spans[key]
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, entry.dtype)
        return np.memmap(self._path, entry.dtype, "r", self._start + begin, entry.shape)


def _header(path: Path, size: int) -> tuple[dict, int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: truncated, or not a safetensors file ({size} bytes, header of {length}).")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object.")
    return header, 8 + length


def _entry(path: Path, key: str, item: Any) -> tuple[Entry, tuple[int, int]]:
    try:
        (begin, end), dtype, shape = item["data_offsets"], item["dtype"], tuple(item["shape"])
        sound = all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry for {key} is malformed.") from error
    if not sound:
        raise CheckpointError(f"{path}: the header's entry for {key} has an offset or size that is no natural number.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {key} has dtype {dtype}; known are {', '.join(DTYPES)}.")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path}: {key} has {end - begin} bytes, its shape {list(shape)} in {dtype} needs another number."
        )
    return Entry(shape, DTYPES[dtype]), (begin, end)


class SafetensorsFolder:
    """All tensors of a Hugging Face folder: one file, or shards listed by ``model.safetensors.index.json``.

    Raises:
        CheckpointError: a shard is missing or truncated, or lacks a key that the index places there.
    """

    def __init__(self, folder: Path) -> None:
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            placed = _index(index)
            missing = sorted({name for name in placed.values() if not (folder / name).exists()})
            if missing:
                raise CheckpointError(f"{folder}: missing shards: {', '.join(missing)}. Download them again.")
            files = {name: SafetensorsFile(folder / name) for name in sorted(set(placed.values()))}
            absent = [key for key, name in placed.items() if key not in files[name].entries]
            if absent:
                raise CheckpointError(
                    f"{folder}: the index promises keys that its shards lack: {', '.join(absent[:5])}."
                )
        elif single.exists():
            files = {single.name: SafetensorsFile(single)}
        else:
            raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json.")
        self._home = {key: file for file in files.values() for key in file.entries}
        self.entries: Mapping[str, Entry] = {key: file.entries[key] for key, file in self._home.items()}

    def read(self, key: str) -> np.ndarray:
        """A read-only view of the mapped shard."""
        return self._home[key].read(key)


def _index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a shard index: no 'weight_map'.") from error
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{path}: not a shard index: its 'weight_map' does not map keys to file names.")
    return placed
