"""Convert Hugging Face files to a folder of Orbax checkpoints, with one part of the model in memory at a time."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoints.files import MARK
from moejax.checkpoints.folder import open_folder
from moejax.checkpoints.orbax import FORMAT, WEIGHTS, save_part
from moejax.checkpoints.plan import parts, report
from moejax.checkpoints.readers import HuggingFaceReader
from moejax.checkpoints.source import describe_source
from moejax.checkpoints.staging import Staging, is_made, making, need_room, staged
from moejax.checkpoints.summary import Conversion, peak_bytes, progress_bar
from moejax.checkpoints.tokenizer import check_tokenizer
from moejax.errors import CheckpointError
from moejax.processes import need_one_process

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""The dtypes that weights can be converted to."""


def convert(
    source: Any, destination: Any, *, dtype: Any = None, allow_nonfinite: bool = False, progress: bool = True
) -> Conversion:
    """Write a Hugging Face model as a folder of Orbax checkpoints that :func:`moejax.load` reads.

    The headers of the source's files, its tokenizer and its other files are checked before a weight is read. Then one
    part of the model at a time is read, written, read back and freed. ``<destination>.partial`` is renamed to
    ``destination`` at the very end. If a run is stopped, the next run keeps its finished parts, provided that source
    and options are the same. If the destination is there already, made from the same, nothing is done.

    Args:
        source: a Hugging Face folder, a hub id or a bundled name.
        destination: the folder to make.
        dtype: cast all weights to ``bfloat16``, ``float16``, ``float32`` or ``float64``; by default each keeps its own.
        allow_nonfinite: accept weights that are NaN or infinite.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the source's files are damaged, change meanwhile, do not fit its configuration or hold NaN or
            infinite weights; the destination exists, made from something else; its partial folder is not ours; or the
            disk is full.
        BusyError: another run is making the destination.
    """
    need_one_process("converting a model")
    start, folder, target = time.perf_counter(), open_folder(source), Path(destination)
    if folder.is_orbax:
        raise CheckpointError(f"{folder.path} is converted already; `moejax export` writes Hugging Face files from it.")
    wanted = None if dtype is None else parse_dtype(dtype)
    with making(target):
        reader = HuggingFaceReader(folder, wanted)
        about = {"command": "convert", "format": FORMAT, "source": describe_source(folder, reader.source.entries)}
        about |= {"dtype": None if wanted is None else wanted.name, "allow_nonfinite": allow_nonfinite}
        names = folder.side_files
        check_tokenizer(folder.path)
        count = len(parts(reader.leaves))
        if is_made(target, about):
            return Conversion(target, 0, time.perf_counter() - start, peak_bytes(), count, count, already=True)
        with staged(target, about, resumes=True) as staging:
            staging.copy(folder.path, names)
            read, resumed = _write_parts(reader, staging, allow_nonfinite, progress)
            staging.write("config.json", _config(reader))
            folder.stamps.check()
    return Conversion(target, read, time.perf_counter() - start, peak_bytes(), count, resumed)


def _write_parts(reader: HuggingFaceReader, staging: Staging, allow_nonfinite: bool, progress: bool) -> tuple[int, int]:
    """Write the parts that an earlier run has not written.

    Returns:
        The bytes read from the source, and the number of parts that were already written.
    """
    sizes = {part: reader.nbytes(part) for part in parts(reader.leaves)}
    staging.declare(WEIGHTS, *(f"{WEIGHTS}/{part}" for part in sizes))
    (staging.folder / WEIGHTS).mkdir(exist_ok=True)
    todo = [part for part in sizes if not staging.has(f"{WEIGHTS}/{part}")]
    for part in todo:
        staging.forget(f"{WEIGHTS}/{part}")
    paths = [path for part in todo for path in parts(reader.leaves)[part]]
    # beside its data, a leaf has a file of metadata
    need_room(staging.folder, [size for path in paths for size in (reader.leaves[path].nbytes, 1)])
    with progress_bar(progress, "converting", sum(sizes.values())) as advance:
        advance(sum(size for part, size in sizes.items() if part not in todo))
        for part in todo:
            # the leaves are bound to no name here, so that they are freed before the next part is read
            if _save_checked(staging.folder / WEIGHTS / part, reader, part, allow_nonfinite):
                staging.record(f"{WEIGHTS}/{part}")
            advance(sizes[part])
    bad = [f"{key!r} ({count})" for key, count in reader.nonfinite.items()]
    if not allow_nonfinite:
        report(bad, f"{reader.folder} has weights that are NaN or infinite (allow_nonfinite accepts them)")
    return sum(sizes[part] for part in todo), len(sizes) - len(todo)


def _save_checked(path: Path, reader: HuggingFaceReader, part: str, allow_nonfinite: bool) -> bool:
    """Read a part and write it; return whether it was written.

    Once a weight is NaN or infinite, further parts are only read, so that the error can list all such weights.
    """
    leaves = reader.read(part)
    if not allow_nonfinite and reader.nonfinite:
        return False
    save_part(path, leaves)
    return True


def _config(reader: HuggingFaceReader) -> dict[str, Any]:
    """Return the ``config.json`` of the converted folder."""
    dtype = str(reader.leaves["embedding"].dtype)
    config = {key: value for key, value in reader.hugging_face.items() if key not in ("torch_dtype", "dtype")}
    # experts that were MXFP4 in the source are stored in full
    config.pop("quantization_config", None)
    return config | {"dtype": dtype, MARK: {"format": FORMAT, "dtype": dtype}}


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
