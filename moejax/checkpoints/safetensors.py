"""Safetensors files: their headers are read and checked first, their data only on demand.

Headers are not trusted. The length and the number of values of a header are bounded, far above those of published
models, so that a hostile one is refused before it takes time and memory. The tensors must tile the rest of the file,
without overlaps and without gaps.
"""

import contextlib
import io
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from moejax.checkpoints.files import (
    LFS_MARK,
    LFS_MEND,
    adapter_message,
    inside,
    is_lfs_pointer,
    parse_object,
    read_object,
)
from moejax.checkpoints.stamps import changed, stamp
from moejax.errors import CheckpointError, one_line

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
"""The dtypes that can be read, by their names in headers."""

_MAX_HEADER = 40_000_000
"""Most bytes of a header; the largest published models have less than a tenth in all their files together."""

_MAX_VALUES = 1_500_000
"""Most values of a header, which is enough for 150,000 tensors."""

_MAX_RANK = 32
"""Most axes of a tensor."""

_WHOLE = "model.safetensors"
"""The name of the file of a model that is not sharded."""

_INDEX = "model.safetensors.index.json"
"""The name of the list of shards."""

_PIECE = 16 << 20
"""The number of bytes that are copied at a time."""


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of a tensor or leaf whose data has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Number of bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Tensors under their published keys, from which a model is loaded."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Shape and dtype of every tensor."""
        ...

    def read(self, key: str) -> np.ndarray:
        """Return the data of a tensor, as a view where possible."""
        ...


class SafetensorsFile:
    """One safetensors file, whose header has been read and checked.

    Attributes:
        entries: shape and dtype of every tensor.

    Raises:
        CheckpointError: the file is truncated, damaged, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size, self._stamp = status.st_size, stamp(status)
            header, self._start = _header(path, file, size)
        header.pop("__metadata__", None)
        tensors = {key: _entry(path, key, item) for key, item in header.items()}
        self._path, self._spans = path, {key: span for key, (_, span) in tensors.items()}
        self.entries: Mapping[str, Entry] = {key: entry for key, (entry, _) in tensors.items()}
        _check_tiling(path, self._spans, size - self._start)

    def read(self, key: str) -> np.ndarray:
        """Return a read-only view of the mapped file."""
        entry, (begin, _) = self.entries[key], self._spans[key]
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, entry.dtype)
        with self._open() as file:
            return np.memmap(file, entry.dtype, "r", self._start + begin, entry.shape)

    @contextlib.contextmanager
    def _open(self) -> Iterator[io.FileIO]:
        """Open the file again.

        Raises:
            CheckpointError: it is another one than before, or was written to, now or at the end of the block.
        """
        with self._path.open("rb", buffering=0) as file:
            if stamp(os.fstat(file.fileno())) != self._stamp:
                raise changed(self._path)
            yield file
            if stamp(os.fstat(file.fileno())) != self._stamp:
                raise changed(self._path)

    def copy_to(self, key: str, out: np.ndarray) -> None:
        """Fill the flat array ``out`` with the values of a tensor, cast to the dtype of ``out``.

        The file is read, not mapped, because the system decides how long mapped pages count as the process's memory.

        Raises:
            CheckpointError: the file has changed since its header was read.
        """
        entry, step = self.entries[key], _PIECE // self.entries[key].dtype.itemsize
        with self._open() as file:
            file.seek(self._start + self._spans[key][0])
            for first in range(0, out.size, step):
                target = out[first : first + step]
                piece = target if target.dtype == entry.dtype else np.empty(target.shape, entry.dtype)
                if file.readinto(piece.view(np.uint8).data) != piece.nbytes:
                    raise changed(self._path)
                if piece is not target:
                    with np.errstate(over="ignore"):  # values that overflow become infinite; callers test for these
                        target[...] = piece

    def checksum(self, key: str) -> int:
        """Return the CRC-32 of a tensor's bytes."""
        (begin, end), crc = self._spans[key], 0
        with self._open() as file:
            file.seek(self._start + begin)
            for first in range(begin, end, _PIECE):
                crc = zlib.crc32(file.read(min(_PIECE, end - first)), crc)
        return crc


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Read the header of a file of ``size`` bytes; return it with the position at which the data begins."""
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if is_lfs_pointer(first + file.read(len(LFS_MARK) - 8)):
        raise CheckpointError(f"{path}: {LFS_MEND}")
    file.seek(8)
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({size} bytes, header of {length}).")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: claims a header of {length} bytes; at most {_MAX_HEADER} are allowed.")
    data = file.read(length)
    if sum(map(data.count, (b",", b"{", b"["))) > _MAX_VALUES:
        raise CheckpointError(f"{path}: its header lists more than {_MAX_VALUES} values; it is damaged or hostile.")
    return parse_object(data, f"{path}: not a safetensors file: its header", CheckpointError), 8 + length


def _entry(path: Path, key: str, item: Any) -> tuple[Entry, tuple[int, int]]:
    """Check the header's item for a tensor; return shape and dtype, and where its data begins and ends."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key!r:.200} {what}")

    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise wrong("is malformed: it lacks dtype, shape or data_offsets.")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"has dtype {dtype!r:.40}; known are {', '.join(DTYPES)}.")
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise wrong(f"has shape {shape!r:.80}, which is not a list of at most {_MAX_RANK} sizes.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"has data_offsets {offsets!r:.80}, which are not a begin and an end.")
    entry, span = Entry(tuple(shape), DTYPES[dtype]), (offsets[0], offsets[1])
    # NumPy refuses some empty shapes too: the product of the sizes that are not zero must be addressable
    if math.prod(max(size, 1) for size in shape) * entry.dtype.itemsize >= 2**63:
        raise wrong(f"has shape {shape!r:.80}, which is too large for any memory.")
    if span[1] - span[0] != entry.nbytes:
        raise wrong(f"has {span[1] - span[0]} bytes, but its shape {shape!r:.80} in {dtype} needs {entry.nbytes}.")
    return entry, span


def _naturals(values: Any) -> bool:
    """Return whether ``values`` is a list of integers that are not negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_tiling(path: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Raise ``CheckpointError`` unless the spans cover each of ``size`` bytes exactly once."""
    end = 0
    for key, span in sorted(spans.items(), key=lambda item: item[1]):
        if span[1] > size:
            raise CheckpointError(
                f"{path}: {key!r:.200}: truncated: it ends at byte {span[1]} of the data, but the file ends at {size}."
            )
        if span[0] != end:
            wrong = "overlaps the tensor before it" if span[0] < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: {key!r:.200} {wrong}: it begins at byte {span[0]} of the data, not at {end}."
            )
        end = span[1]
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to no tensor.")


class SafetensorsFolder:
    """All tensors of a Hugging Face folder: of one file, or of shards that ``model.safetensors.index.json`` lists.

    If the folder has both, the index is a leftover, and the one file is read.

    Attributes:
        paths: the path of each file, by its name.
        entries: shape and dtype of every tensor.

    Raises:
        CheckpointError: a shard is missing, damaged or outside the folder, or lacks a key that the index places there.
    """

    def __init__(self, folder: Path) -> None:
        index = read_object(folder, _INDEX, CheckpointError)
        if index is not None and inside(folder, _WHOLE) is not None:
            text = f"{folder} has both {_WHOLE} and {_INDEX}; the one file is read, as transformers does."
            warnings.warn(one_line(text), stacklevel=2)
            index = None
        weight_map = {} if index is None else _weight_map(folder, index)
        names = sorted(set(weight_map.values())) if weight_map else [_WHOLE]
        self.paths = {name: inside(folder, name) for name in names}
        missing = [name for name, path in self.paths.items() if path is None]
        if missing:
            raise CheckpointError(_missing(folder, missing) if weight_map else _no_weights(folder))
        files = {name: SafetensorsFile(path) for name, path in self.paths.items() if path is not None}
        absent = [key for key, name in weight_map.items() if key not in files[name].entries]
        if absent:
            raise CheckpointError(f"{folder}: the index lists keys that its shards lack: {', '.join(absent[:5])}.")
        self._file_of: dict[str, SafetensorsFile] = {}
        for name, file in files.items():
            if repeated := sorted(self._file_of.keys() & file.entries.keys()):
                raise CheckpointError(f"{folder}: {name} repeats keys of other shards: {', '.join(repeated[:5])}.")
            self._file_of |= dict.fromkeys(file.entries, file)
        self.entries: Mapping[str, Entry] = {key: file.entries[key] for key, file in self._file_of.items()}

    def read(self, key: str) -> np.ndarray:
        """Return a read-only view of the mapped shard."""
        return self._file_of[key].read(key)

    def copy_to(self, key: str, out: np.ndarray) -> None:
        """Fill a flat array with the values of a tensor (:meth:`SafetensorsFile.copy_to`)."""
        self._file_of[key].copy_to(key, out)


def _weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the names of the files that hold the tensors, by their keys."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(
            f"{folder}/model.safetensors.index.json: not a shard index: no 'weight_map' from keys to file names."
        )
    return names


def _missing(folder: Path, names: list[str]) -> str:
    """Return the error message for missing shards."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}: missing shards: {', '.join(names[:5])}{more}. Download them again."


def _no_weights(folder: Path) -> str:
    """Return the error message for a folder without safetensors files, which tells what it holds instead."""
    if (folder / "adapter_config.json").is_file():
        return adapter_message(folder)
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"{folder}: only {ggufs[0]}, which is not read; get the model's safetensors files."
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not pickles:
        return f"{folder}: no model.safetensors and no model.safetensors.index.json."
    return (
        f"{folder}: only {pickles[0]}, a pickle, which can run any code when it is read, so it is not read. "
        'If you trust it, convert it to safetensors: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained('DESTINATION')\"."
    )
