"""Folders of Orbax checkpoints: what ``moejax convert`` writes.

    config.json       the Hugging Face config, and a field "moejax" that says what this folder is
    tokenizer.json    and the other small files of the model, as they were
    weights/PART      an Orbax checkpoint for ``embedding``, for each of ``layers.N``, and for ``output``: the leaves of
                      that part of the decoder under their paths, ``{"layers.0.feed_forward.down": [E, D, F], ..}``

A leaf is stored uncompressed (weights do not shrink) in chunks of whole entries of its first axis, so that it is
written straight from where it lies, and that a device restores its experts without reading the others'.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moejax.checkpoints.files import MARK, read_config, read_object
from moejax.checkpoints.plan import leaf_paths, parts, report
from moejax.checkpoints.safetensors import Entry
from moejax.errors import CheckpointError, ConfigError
from moejax.models import Decoder, family

FORMAT = 2
"""Since queries, keys and values are one leaf."""

WEIGHTS = "weights"
_CHUNK = 64 << 20
"""Most bytes of a chunk. Copies above 32 MiB glibc gives back at once; of smaller ones every thread keeps some."""


def is_orbax(folder: Path) -> bool:
    """Whether the folder says that ``moejax convert`` wrote it."""
    config = read_object(folder, "config.json", ConfigError)
    return config is not None and MARK in config


def save_part(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Write some leaves as the Orbax checkpoint ``path``, which appears when it is complete.

    Next to no memory is needed beside the leaves' own.
    """
    # imported here: it takes a second and loading Hugging Face files never needs it
    import orbax.checkpoint as ocp

    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,  # it gathers a copy of what it will write
            use_compression=False,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, _writer())),
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), ocp.args.PyTreeSave(dict(leaves)), force=True)


def _writer() -> Any:
    import tensorstore as ts
    from orbax.checkpoint import type_handlers

    class OneByOne(type_handlers.NumpyHandler):
        """Writes arrays and their chunks one after the other, so that no more than one chunk at a time is copied."""

        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)
            self._turn = asyncio.Lock()

        async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
            rows = _chunk_rows(value) if value.ndim else 1
            tspec["metadata"]["chunks"] = [max(size, 1) for size in (rows, *value.shape[1:])][: value.ndim]
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            if not value.ndim:
                await store.write(value)
                return
            async with self._turn:
                # one buffer for all chunks of a transposed leaf: the heap keeps what many buffers held
                buffer = None if value.flags.c_contiguous else np.empty((rows, *value.shape[1:]), value.dtype)
                for start in range(0, len(value), rows):
                    piece = value[start : start + rows]
                    if buffer is not None:
                        buffer[: len(piece)] = piece
                        piece = buffer[: len(piece)]
                    # a chunk is on disk when this returns
                    await store[start : start + len(piece)].write(piece, can_reference_source_data_indefinitely=True)

    return OneByOne()


def _chunk_rows(value: np.ndarray) -> int:
    """The most entries of the first axis that fit a chunk and divide the axis, since chunks are stored in full."""
    fit = min(len(value), max(1, _CHUNK // max(1, math.prod(value.shape[1:]) * value.itemsize)))
    return next((rows for rows in range(fit, fit // 4, -1) if len(value) % rows == 0), max(fit, 1))


class OrbaxFolder:
    """A folder that ``moejax convert`` wrote, opened: its config and the shape and dtype of every leaf.

    Raises:
        ConfigError: the configuration is not supported, or of a newer format.
        CheckpointError: parts or leaves are missing, unused or misshapen; all of them are named together.
    """

    def __init__(self, folder: Path) -> None:
        config, about = read_config(folder), (read_object(folder, "config.json", ConfigError) or {}).get(MARK)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ConfigError(
                f"{folder}: written in a format that this version does not read ({about!r:.80}); convert it again."
            )
        self.folder, self.hugging_face = folder, config
        kind = family(config.get("model_type"))
        self.abstract = Decoder.abstract(kind.config(config))
        self.leaves = self._check(dict(leaf_paths(self.abstract)))

    def _check(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
        problems, found = [], {}
        for part in parts(wanted):
            path = self.folder / WEIGHTS / part
            if not path.is_dir():
                problems.append(f"missing part {part}")
            else:
                found |= _stored(path)
        if not problems:
            problems += [f"missing {path} {list(leaf.shape)}" for path, leaf in wanted.items() if path not in found]
            problems += [f"unused {path} {list(entry.shape)}" for path, entry in found.items() if path not in wanted]
            problems += [
                f"misshapen {path}: the checkpoint has {list(found[path].shape)}, the config wants {list(leaf.shape)}"
                for path, leaf in wanted.items()
                if path in found and found[path].shape != leaf.shape
            ]
        report(problems, f"{self.folder} does not fit its config")
        return {path: found[path] for path in wanted}

    def restore(
        self, part: str, dtype: np.dtype | None = None, shardings: Mapping[str, jax.sharding.Sharding] | None = None
    ) -> dict[str, Any]:
        """The leaves of a part under their paths: on the host, or laid out over devices by ``shardings``.

        Raises:
            CheckpointError: the files are damaged.
        """
        import orbax.checkpoint as ocp

        paths = parts(self.leaves)[part]
        args = {path: self._restore_args(path, dtype, (shardings or {}).get(path)) for path in paths}
        with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            try:
                restored = checkpointer.restore(
                    (self.folder / WEIGHTS / part).absolute(), ocp.args.PyTreeRestore(restore_args=args)
                )
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{self.folder}: {part} cannot be read: {_first_line(error)}") from error
        return {path: restored[path] for path in paths}

    def _restore_args(self, path: str, dtype: np.dtype | None, sharding: jax.sharding.Sharding | None) -> Any:
        import orbax.checkpoint as ocp

        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=self.leaves[path].shape, dtype=dtype)


def _stored(path: Path) -> dict[str, Entry]:
    """Shape and dtype of every leaf of a part."""
    import orbax.checkpoint as ocp

    try:
        with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute())
            tree = metadata.item_metadata.tree
            return {name: Entry(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in tree.items()}
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a complete Orbax checkpoint: {_first_line(error)}") from error


def load_orbax(folder: Path, dtype: DTypeLike | None = None, shardings: Any = None) -> Decoder:
    """The decoder of a folder that ``moejax convert`` wrote.

    Args:
        folder: the folder.
        dtype: cast every leaf to it; by default each keeps its own.
        shardings: where leaves go: a mapping from paths (``layers.0.feed_forward.down``) to ``jax.sharding.Sharding``,
            or a function that makes one from the abstract decoder, or a tree of the decoder's structure. A device is
            given its part of a leaf and nothing else. Leaves without a sharding go to the default device.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the leaves do not fit it.
    """
    source = OrbaxFolder(folder)
    if callable(shardings) and not isinstance(shardings, Decoder):
        shardings = shardings(source.abstract)
    if isinstance(shardings, Decoder):
        shardings = dict(leaf_paths(shardings))
    dtype = None if dtype is None else np.dtype(dtype)
    leaves: dict[str, jax.Array] = {}
    for part in parts(source.leaves):
        leaves |= {path: jnp.asarray(leaf) for path, leaf in source.restore(part, dtype, shardings).items()}
    return jax.tree.unflatten(jax.tree.structure(source.abstract), [leaves[path] for path in source.leaves])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that Orbax logs at every part."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
