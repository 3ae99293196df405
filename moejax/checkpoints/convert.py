"""Convert Hugging Face files to a folder of Orbax checkpoints, with one part of the model in memory at a time."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoints.files import (
    MARK,
    copy_side_files,
    need_room,
    read_object,
    refuse_existing,
    staged,
    write_object,
)
from moejax.checkpoints.folder import open_folder
from moejax.checkpoints.orbax import FORMAT, WEIGHTS, save_part
from moejax.checkpoints.plan import parts, report
from moejax.checkpoints.readers import HuggingFaceReader
from moejax.checkpoints.summary import Conversion, peak_bytes, progress_bar
from moejax.errors import CheckpointError

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""The dtypes that weights can be converted to."""

_FINGERPRINT = "fingerprint.json"
"""The file of a partial folder that says what it is made from."""


def convert(
    source: Any, destination: Any, *, dtype: Any = None, allow_nonfinite: bool = False, progress: bool = True
) -> Conversion:
    """Write a Hugging Face model as a folder of Orbax checkpoints that :func:`moejax.load` reads.

    The headers of the source's files are checked completely before a weight is read. Then one part of the model at a
    time is read, written and freed. ``<destination>.partial`` is renamed to ``destination`` at the very end. If a run
    is stopped, the next run keeps its finished parts, provided that source and options are the same.

    Args:
        source: a Hugging Face folder, a hub id or a bundled name.
        destination: the folder to make.
        dtype: cast all weights to ``bfloat16``, ``float16``, ``float32`` or ``float64``; by default each keeps its own.
        allow_nonfinite: accept weights that are NaN or infinite.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the source's files are damaged, do not fit its configuration or hold NaN or infinite weights;
            or the destination exists.
    """
    start, folder, target = time.perf_counter(), open_folder(source), Path(destination)
    refuse_existing(target)
    if folder.is_orbax:
        raise CheckpointError(f"{folder.path} is converted already; `moejax export` writes Hugging Face files from it.")
    reader = HuggingFaceReader(folder, None if dtype is None else parse_dtype(dtype))
    fingerprint = _fingerprint(reader, dtype, allow_nonfinite)
    with staged(target, keep=lambda partial: _has_fingerprint(partial, fingerprint)) as partial:
        write_object(partial / _FINGERPRINT, fingerprint)
        read, resumed = _write_parts(reader, partial / WEIGHTS, allow_nonfinite, progress)
        copy_side_files(folder.path, partial)
        write_object(partial / "config.json", _config(reader))
        (partial / _FINGERPRINT).unlink()
    return Conversion(target, read, time.perf_counter() - start, peak_bytes(), len(parts(reader.leaves)), resumed)


def _write_parts(reader: HuggingFaceReader, folder: Path, allow_nonfinite: bool, progress: bool) -> tuple[int, int]:
    """Write the parts that ``folder`` does not have yet.

    Returns:
        The bytes read from the source, and the number of parts that were already written.
    """
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(stale)
    sizes = {part: reader.nbytes(part) for part in parts(reader.leaves)}
    todo = [part for part in sizes if not (folder / part).exists()]
    written = {part: sum(reader.leaves[path].nbytes for path in paths) for part, paths in parts(reader.leaves).items()}
    need_room(folder, sum(written[part] for part in todo))
    with progress_bar(progress, "converting", sum(sizes.values())) as advance:
        advance(sum(size for part, size in sizes.items() if part not in todo))
        for part in todo:
            # the leaves are bound to no name here, so that they are freed before the next part is read
            _save_checked(folder / part, reader, part, allow_nonfinite)
            advance(sizes[part])
    bad = [f"{key!r} ({count})" for key, count in reader.nonfinite.items()]
    if not allow_nonfinite:
        report(bad, f"{reader.folder} has weights that are NaN or infinite (allow_nonfinite accepts them)")
    return sum(sizes[part] for part in todo), len(sizes) - len(todo)


def _save_checked(path: Path, reader: HuggingFaceReader, part: str, allow_nonfinite: bool) -> None:
    """Read a part and write it.

    Once a weight is NaN or infinite, further parts are only read, so that the error can list all such weights.
    """
    leaves = reader.read(part)
    if allow_nonfinite or not reader.nonfinite:
        save_part(path, leaves)


def _config(reader: HuggingFaceReader) -> dict[str, Any]:
    """Return the ``config.json`` of the converted folder."""
    dtype = str(reader.leaves["embedding"].dtype)
    config = {key: value for key, value in reader.hugging_face.items() if key not in ("torch_dtype", "dtype")}
    # experts that were MXFP4 in the source are stored in full
    config.pop("quantization_config", None)
    return config | {"dtype": dtype, MARK: {"format": FORMAT, "dtype": dtype}}


def _fingerprint(reader: HuggingFaceReader, dtype: Any, allow_nonfinite: bool) -> dict[str, Any]:
    """Return what a partial folder is made from: config, headers, sizes and times of the files, and the options."""
    stats = {name: path.stat() for name, path in reader.source.paths.items() if path is not None}
    about = {
        "config": dict(reader.hugging_face),
        "tensors": {key: [list(e.shape), str(e.dtype)] for key, e in reader.source.entries.items()},
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    given = None if dtype is None else str(np.dtype(dtype))
    return {"format": FORMAT, "source": digest, "dtype": given, "allow_nonfinite": allow_nonfinite}


def _has_fingerprint(partial: Path, fingerprint: dict[str, Any]) -> bool:
    """Return whether a partial folder was begun from the same source with the same options."""
    try:
        return read_object(partial, _FINGERPRINT, CheckpointError) == fingerprint
    except CheckpointError:
        return False


def parse_dtype(dtype: Any) -> np.dtype:
    """Return the dtype that a name or a dtype-like object stands for.

    Raises:
        CheckpointError: it is not one of ``DTYPES``.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise CheckpointError(f"weights cannot have dtype {name!r}; choose from {', '.join(DTYPES)}.")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
