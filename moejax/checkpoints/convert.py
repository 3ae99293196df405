"""From Hugging Face files to a folder of Orbax checkpoints, one part of the model in memory at a time."""

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
from moejax.checkpoints.load import find
from moejax.checkpoints.orbax import FORMAT, WEIGHTS, is_orbax, save_part
from moejax.checkpoints.plan import parts, report
from moejax.checkpoints.summary import Conversion, peak_bytes, progress_bar
from moejax.checkpoints.weights import HuggingFaceWeights
from moejax.errors import CheckpointError

DTYPES = ("bfloat16", "float16", "float32", "float64")
_FINGERPRINT = "fingerprint.json"


def convert(
    source: Any, destination: Any, *, dtype: Any = None, allow_nonfinite: bool = False, progress: bool = True
) -> Conversion:
    """Write a Hugging Face model as a folder of Orbax checkpoints that :func:`moejax.load` reads.

    Everything that can be wrong with the source's files is found in their headers, before a weight is read. Then one
    part of the model at a time is read, written and forgotten. ``<destination>.partial`` becomes ``destination`` at
    the very end; where a run was stopped, the next one takes up its finished parts if source and dtype are the same.

    Args:
        source: a Hugging Face folder, a hub id or a bundled name.
        destination: the folder to make.
        dtype: of all weights: ``bfloat16``, ``float16``, ``float32`` or ``float64``; by default each keeps its own.
        allow_nonfinite: accept weights that are NaN or infinite.
        progress: show a bar on stderr.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the source's files are damaged, do not fit its configuration or hold weights that are not
            finite; or the destination exists.
    """
    start, folder, target = time.perf_counter(), find(source), Path(destination)
    refuse_existing(target)
    if is_orbax(folder):
        raise CheckpointError(f"{folder} is converted already; `moejax export` writes Hugging Face files from it.")
    weights = HuggingFaceWeights(folder, None if dtype is None else parse_dtype(dtype))
    mark = _fingerprint(weights, dtype, allow_nonfinite)
    with staged(target, keep=lambda partial: _belongs(partial, mark)) as partial:
        write_object(partial / _FINGERPRINT, mark)
        read, resumed = _write_parts(weights, partial / WEIGHTS, allow_nonfinite, progress)
        copy_side_files(folder, partial)
        write_object(partial / "config.json", _config(weights))
        (partial / _FINGERPRINT).unlink()
    return Conversion(target, read, time.perf_counter() - start, peak_bytes(), len(parts(weights.leaves)), resumed)


def _write_parts(weights: HuggingFaceWeights, folder: Path, allow_nonfinite: bool, progress: bool) -> tuple[int, int]:
    """Write what is not there yet; bytes read, and the number of parts that were there."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(stale)
    sizes = {part: weights.nbytes(part) for part in parts(weights.leaves)}
    todo = [part for part in sizes if not (folder / part).exists()]
    written = {
        part: sum(weights.leaves[path].nbytes for path in paths) for part, paths in parts(weights.leaves).items()
    }
    need_room(folder, sum(written[part] for part in todo))
    with progress_bar(progress, "converting", sum(sizes.values())) as advance:
        advance(sum(size for part, size in sizes.items() if part not in todo))
        for part in todo:
            # no name is bound to the leaves, so that they are gone before the next part's are read
            _save_checked(folder / part, weights, part, allow_nonfinite)
            advance(sizes[part])
    bad = [f"{key!r} ({count})" for key, count in weights.nonfinite.items()]
    if not allow_nonfinite:
        report(bad, f"{weights.folder} has weights that are NaN or infinite (allow_nonfinite accepts them)")
    return sum(sizes[part] for part in todo), len(sizes) - len(todo)


def _save_checked(path: Path, weights: HuggingFaceWeights, part: str, allow_nonfinite: bool) -> None:
    """Write a part, unless something in the model is not finite: then only the rest of it is looked through."""
    leaves = weights.read(part)
    if allow_nonfinite or not weights.nonfinite:
        save_part(path, leaves)


def _config(weights: HuggingFaceWeights) -> dict[str, Any]:
    dtype = str(weights.leaves["embedding"].dtype)
    config = {key: value for key, value in weights.hugging_face.items() if key not in ("torch_dtype", "dtype")}
    # whatever was packed in the source is stored in full
    config.pop("quantization_config", None)
    return config | {"dtype": dtype, MARK: {"format": FORMAT, "dtype": dtype}}


def _fingerprint(weights: HuggingFaceWeights, dtype: Any, allow_nonfinite: bool) -> dict[str, Any]:
    """What a partial folder must have been made of to be taken up: config, headers, the files' sizes and times."""
    stats = {name: path.stat() for name, path in weights.source.paths.items() if path is not None}
    about = {
        "config": dict(weights.hugging_face),
        "tensors": {key: [list(e.shape), str(e.dtype)] for key, e in weights.source.entries.items()},
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    given = None if dtype is None else str(np.dtype(dtype))
    return {"format": FORMAT, "source": digest, "dtype": given, "allow_nonfinite": allow_nonfinite}


def _belongs(partial: Path, mark: dict[str, Any]) -> bool:
    try:
        return read_object(partial, _FINGERPRINT, CheckpointError) == mark
    except CheckpointError:
        return False


def parse_dtype(dtype: Any) -> np.dtype:
    """A dtype of weights by its name.

    Raises:
        CheckpointError: it is none.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise CheckpointError(f"dtype {name!r} is none for weights; choose from {', '.join(DTYPES)}.")
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
