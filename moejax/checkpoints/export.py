"""Write a model as Hugging Face files, with one part of the model in memory at a time.

The key tables of the families (:mod:`moejax.models.keys`) are used in the direction from leaves to tensors.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoints.files import MARK, write_object
from moejax.checkpoints.folder import open_folder
from moejax.checkpoints.plan import layouts, leaf_paths, parts
from moejax.checkpoints.readers import CheckpointReader, DecoderReader, open_reader
from moejax.checkpoints.safetensors import DTYPES, Entry, SafetensorsFile
from moejax.checkpoints.source import describe_source
from moejax.checkpoints.staging import Staging, is_made, making, need_room, staged
from moejax.checkpoints.summary import Conversion, peak_bytes, progress_bar
from moejax.checkpoints.tokenizer import check_tokenizer
from moejax.errors import CheckpointError
from moejax.models import Decoder, family
from moejax.models.keys import KeyTable
from moejax.processes import need_one_process
from moejax.writing import LOCK, TEMPORARY, locked

_INDEX = "model.safetensors.index.json"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""From dtypes to their names in safetensors headers."""


def to_tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """Return the decoder's weights under their published keys, as views where the layout allows it."""
    table = family(decoder.config.model_type).keys
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in leaf_paths(decoder):
        data = np.asarray(leaf)
        tensors |= layouts(table, path, data.shape)[-1].split(data)
    return tensors


def export(
    source: Any,
    destination: Any,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dequantise: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write a model as Hugging Face files, which transformers and other software for the family can load.

    The folder appears under its name only when it is complete and was read back. If it is there already, made from the
    same, nothing is done. A folder with MXFP4 experts is written with experts in
    full. A loaded model whose experts are MXFP4 in memory (``load(.., keep_packed=True)``) is written with MXFP4
    experts. One whose experts were quantised (``load(.., experts="int8")``) is refused, unless ``dequantise`` is given.

    Args:
        source: a folder of either kind, a bundled name, a hub id, or a loaded model.
        destination: the folder to make.
        max_shard_bytes: the most bytes of tensors in a file; a single tensor that is larger gets a file of its own.
        dequantise: write packed experts of a loaded model as their values, in the dtype of its embedding; what
            quantising lost is not restored.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: the configuration is not supported, a loaded model does not have its Hugging Face config, or its
            experts were quantised.
        CheckpointError: the source's files are damaged or change meanwhile; the destination exists, made from something
            else; its partial folder is not ours; or the disk is full.
        BusyError: another run is making the destination.
    """
    need_one_process("exporting a model")
    start, target = time.perf_counter(), Path(destination)
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: must be at least 1.")
    folder = None if hasattr(source, "decoder") else open_folder(source)
    reader = open_reader(source if folder is None else folder, dequantise=dequantise)
    about = {"command": "export", "max_shard_bytes": max_shard_bytes, "dequantise": dequantise}
    count = len(parts(reader.leaves))
    with making(target):
        names = [] if folder is None else folder.side_files
        if folder is not None:
            check_tokenizer(folder.path)
            about["source"] = describe_source(folder, reader.leaves)
        elif os.path.lexists(target):
            about["source"] = _describe_loaded(source, _sums(reader))
        if is_made(target, about):
            return Conversion(target, 0, time.perf_counter() - start, peak_bytes(), count, count, already=True)
        with staged(target, about) as staging:
            staging.copy(Path() if folder is None else folder.path, names)
            sums = _write(reader, staging.folder, max_shard_bytes, progress, staging.declare)
            if folder is None:
                _save_tokenizer(source, staging)
                staging.manifest.about = about | {"source": _describe_loaded(source, sums)}
            else:
                folder.stamps.check()
    total = sum(entry.nbytes for entry in reader.leaves.values())
    return Conversion(target, total, time.perf_counter() - start, peak_bytes(), count, 0)


def _describe_loaded(lm: Any, sums: Mapping[str, int]) -> str:
    """Return a digest of a loaded model: its config, its tensors, by their checksums, and its tokenizer."""
    tokenizer = getattr(lm, "tokenizer", None)
    about = [dict(lm.hugging_face), dict(sums), None if tokenizer is None else tokenizer.digest]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _save_tokenizer(lm: Any, staging: Staging) -> None:
    """Write the tokenizer of a loaded model, if it has one."""
    if (tokenizer := getattr(lm, "tokenizer", None)) is None:
        return
    # which files it writes is known only afterwards
    staging.declare("tokenizer-files")
    folder = staging.folder / "tokenizer-files"
    folder.mkdir()
    tokenizer.save(folder)
    for path in sorted(folder.iterdir()):
        staging.declare(path.name)
        os.replace(path, staging.folder / path.name)
    folder.rmdir()


def save_folder(decoder: Decoder, hugging_face: dict[str, Any], folder: Path) -> None:
    """Write a decoder's ``model.safetensors`` and ``config.json`` into a folder, over an earlier version if any.

    Each of the two is complete or as it was before.

    Args:
        decoder: the decoder.
        hugging_face: the fields of the Hugging Face config that describes it.
        folder: the folder, which is made if it does not exist.

    Raises:
        ConfigError: the Hugging Face config describes another decoder.
        CheckpointError: a file reads back differently from what was written.
        BusyError: another run is writing the folder.
    """
    reader = DecoderReader(decoder, hugging_face)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, folder):
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            _write(reader, partial, None, progress=False)
            for name in ("model.safetensors", "config.json"):
                os.replace(partial / name, folder / name)
        finally:
            shutil.rmtree(partial)


@dataclass(frozen=True)
class _Shard:
    """A safetensors file to write.

    Attributes:
        name: the name of the file.
        header: its length and header, as the file begins with them.
        offsets: the position in the file at which the data of each tensor begins, in bytes.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]


def _write(
    reader: CheckpointReader,
    folder: Path,
    max_shard_bytes: int | None,
    progress: bool,
    declare: Callable[..., None] = lambda *names: None,
) -> dict[str, int]:
    """Write weights and config into ``folder``, and read the weights back.

    Args:
        declare: called with the names of the files before they are made.

    Returns:
        The checksum of each tensor, by its key.
    """
    table = family(reader.hugging_face.get("model_type")).keys
    entries = _entries(table, reader)
    need_room(folder, [entry.nbytes for entry in entries.values()])
    shards = _plan_shards(entries, max_shard_bytes)
    declare("config.json", *[_INDEX][: len(shards) - 1], *(shard.name for shard in shards))
    for shard in shards:
        (folder / shard.name).write_bytes(shard.header)
    sums: dict[str, int] = {}
    with progress_bar(progress, "exporting", sum(entry.nbytes for entry in entries.values())) as advance:
        for shard, key, data in _pieces(table, reader, entries, shards):
            with (folder / shard.name).open("r+b") as file:
                file.seek(shard.offsets[key])
                file.write(data)
            sums[key] = zlib.crc32(data)
            advance(data.nbytes)
    _read_back(folder, shards, sums)
    if len(shards) > 1:
        weight_map = {key: shard.name for shard in shards for key in shard.offsets}
        size = {"total_size": sum(entry.nbytes for entry in entries.values())}
        write_object(folder / _INDEX, {"metadata": size, "weight_map": weight_map})
    packed = any(entry.dtype == np.uint8 for entry in reader.leaves.values())
    dropped = {MARK, "torch_dtype", "dtype"} | (set() if packed else {"quantization_config"})
    config = {key: value for key, value in reader.hugging_face.items() if key not in dropped}
    write_object(folder / "config.json", config | {"dtype": str(reader.leaves["embedding"].dtype)})
    return sums


def _sums(reader: CheckpointReader) -> dict[str, int]:
    """Return the checksums that the tensors would be written with."""
    table = family(reader.hugging_face.get("model_type")).keys
    entries = _entries(table, reader)
    pieces = _pieces(table, reader, entries, _plan_shards(entries, None))
    return {key: zlib.crc32(data) for _, key, data in pieces}


def _read_back(folder: Path, shards: list[_Shard], sums: Mapping[str, int]) -> None:
    """Raise ``CheckpointError`` unless the files hold the tensors that were written."""
    for shard in shards:
        file = SafetensorsFile(folder / shard.name)
        for key in shard.offsets:
            if file.checksum(key) != sums[key]:
                raise CheckpointError(f"{folder / shard.name}: {key} reads back differently from what was written.")


def _entries(table: KeyTable, reader: CheckpointReader) -> dict[str, Entry]:
    """Return shape and dtype of the tensors to write, by their keys."""
    return {
        key: replace(entry, dtype=reader.dtypes.get(key, entry.dtype))
        for path in reader.leaves
        for key, entry in _tensors(table, path, reader.leaves[path])
    }


def _pieces(
    table: KeyTable, reader: CheckpointReader, entries: Mapping[str, Entry], shards: list[_Shard]
) -> Iterator[tuple[_Shard, str, memoryview]]:
    """Yield the bytes of each tensor with its shard and key, one part of the model after the other."""
    for part in parts(reader.leaves):
        for shard, key, leaf in _with_shards(table, reader.read(part), shards):
            data = leaf.astype(entries[key].dtype, copy=False)
            yield shard, key, np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def _tensors(table: KeyTable, path: str, leaf: Entry) -> Iterator[tuple[str, Entry]]:
    """Yield key, shape and dtype of the tensors as which a leaf is published."""
    for key, shape in layouts(table, path, leaf.shape)[-1].tensors:
        yield key, Entry(shape, leaf.dtype)


def _with_shards(
    table: KeyTable, leaves: dict[str, np.ndarray], shards: list[_Shard]
) -> Iterator[tuple[_Shard, str, np.ndarray]]:
    """Yield the tensors of a part, each with its key and its shard; empty ``leaves``, so that each is freed in turn."""
    shard_of = {key: shard for shard in shards for key in shard.offsets}
    while leaves:
        path, leaf = leaves.popitem()
        for key, data in layouts(table, path, leaf.shape)[-1].split(leaf).items():
            yield shard_of[key], key, data


def _plan_shards(entries: Mapping[str, Entry], max_shard_bytes: int | None) -> list[_Shard]:
    """Fill one file after the other with tensors, in the order given."""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for key, entry in entries.items():
        if groups[-1] and max_shard_bytes is not None and size + entry.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][key] = entry
        size += entry.nbytes
    count = len(groups)
    names = (
        [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, entries: Mapping[str, Entry]) -> _Shard:
    """Lay out the tensors of one file."""
    # wide dtypes come first, so that every tensor is aligned to its dtype, as readers of mapped files prefer it
    ordered = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for key in ordered:
        begins[key], end = end, end + entries[key].nbytes
        about = {"dtype": _NAMES[entries[key].dtype], "shape": entries[key].shape, "data_offsets": [begins[key], end]}
        header[key] = about
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return _Shard(name, len(text).to_bytes(8, "little") + text, {key: start + begin for key, begin in begins.items()})
