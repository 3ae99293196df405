"""Folders of Orbax checkpoints, as ``moejax convert`` writes them.

    config.json       the Hugging Face config, and a field "moejax" with the format and the dtype of the folder
    tokenizer.json    and the other small files of the model, copied unchanged
    weights/PART      an Orbax checkpoint for ``embedding``, for each of ``layers.N``, and for ``output``: the leaves of
                      that part of the decoder under their paths, ``{"layers.0.attention_norm.weight": [D], ..}``

A leaf is stored uncompressed, since weights do not shrink, in chunks of complete entries of its first axis. So it is
written directly from its own memory, and a device restores its experts without reading the experts of other devices.
"""

import asyncio
import contextlib
import logging
import math
import sys
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moejax.checkpoints.files import MANIFEST
from moejax.checkpoints.folder import ModelFolder
from moejax.checkpoints.manifest import Manifest
from moejax.checkpoints.old_formats import READABLE
from moejax.checkpoints.plan import leaf_paths, parts, report
from moejax.checkpoints.safetensors import Entry
from moejax.errors import CheckpointError, ConfigError
from moejax.models import Decoder, family
from moejax.models.old_paths import old_path

FORMAT = 3
"""The format that is written. Format 2 had other paths for some leaves (:mod:`moejax.checkpoints.old_formats`)."""

WEIGHTS = "weights"
"""The subfolder with the checkpoint of each part."""

_CHUNK = 64 << 20
"""Most bytes of a chunk. glibc returns copies above 32 MiB to the system at once, but keeps smaller ones per thread."""

_LAST_WRITES = 0.5
"""Seconds in which writes end that are on their way when another has failed."""

_METADATA = 1 << 20
"""Most bytes of a file of metadata."""

Shardings = Mapping[str, jax.sharding.Sharding]
"""From the paths of leaves to their places on devices."""


def save_part(path: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Write some leaves as the Orbax checkpoint ``path``, which appears when it is complete.

    The leaves are hardly copied: this takes little memory beyond the leaves themselves.

    Raises:
        CheckpointError: they cannot be written, or read back differently.
    """
    # imported late: the import takes a second, and loading Hugging Face files never needs it
    import orbax.checkpoint as ocp

    with quiet():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,  # OCDBT gathers a copy of everything that it will write
            use_compression=False,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry((np.ndarray, _writer())),
        )
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(path.absolute(), ocp.args.PyTreeSave(dict(leaves)), force=True)
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be written: {first_line(error)}") from error
    if not path.is_dir():
        raise CheckpointError(f"{path} was not written: of several processes, Orbax has the first alone write.")


def _writer() -> Any:
    """Return a handler that writes NumPy arrays one chunk at a time."""
    import tensorstore as ts
    from orbax.checkpoint import type_handlers

    class OneByOne(type_handlers.NumpyHandler):
        """Writes arrays and their chunks one after the other, so that at most one chunk is copied at a time."""

        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)
            self._turn, self._failed = asyncio.Lock(), False

        async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
            async with self._turn:
                if self._failed:
                    return
                # if the next write fails, nothing else may be on its way when Orbax closes the loop
                self._failed = True
                await self._write(value, tspec, ts_context)
                self._failed = False

        async def _write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: ts.Context) -> None:
            rows = _chunk_rows(value) if value.ndim else 1
            tspec["metadata"]["chunks"] = [max(size, 1) for size in (rows, *value.shape[1:])][: value.ndim]
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            if not value.ndim:
                await store.write(value)
                _compare(value, await store.read())
                return
            # one buffer for all chunks of a transposed leaf, since the heap would keep the memory of many buffers
            buffer = None if value.flags.c_contiguous else np.empty((rows, *value.shape[1:]), value.dtype)
            for start in range(0, len(value), rows):
                piece = value[start : start + rows]
                if buffer is not None:
                    buffer[: len(piece)] = piece
                    piece = buffer[: len(piece)]
                # the chunk is on disk when this returns
                place = store[start : start + len(piece)]
                await place.write(piece, can_reference_source_data_indefinitely=True)
                _compare(piece, await place.read())

    return OneByOne()


def _compare(written: np.ndarray, read: np.ndarray) -> None:
    """Raise ``OSError`` unless two arrays have the same bytes."""
    # sums take no memory for a mask, and NaN is like NaN
    first, second = (
        zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) for array in (written, read)
    )
    if first != second:
        raise OSError("a chunk reads back differently from what was written")


def _chunk_rows(value: np.ndarray) -> int:
    """Return the most entries of the first axis that fit a chunk and divide the axis, since chunks are stored in full.

    Where no such number is near the limit, return one that does not divide the axis.
    """
    fit = min(len(value), max(1, _CHUNK // max(1, math.prod(value.shape[1:]) * value.itemsize)))
    return next((rows for rows in range(fit, fit // 4, -1) if len(value) % rows == 0), max(fit, 1))


class OrbaxFolder:
    """The leaves of a folder that ``moejax convert`` wrote, checked against its config but not read yet.

    Attributes:
        folder: the folder.
        abstract: the decoder that the config describes, with ``jax.ShapeDtypeStruct`` leaves.
        leaves: shape and dtype of every stored leaf by its path in the decoder, in the order of the decoder's tree.

    Raises:
        ConfigError: the configuration is not supported, or the folder's format is not.
        CheckpointError: parts or leaves are missing, unused or misshapen; one error names all of them.
    """

    def __init__(self, folder: ModelFolder) -> None:
        folder.stamps.add(WEIGHTS)
        mark = folder.mark
        written = mark.get("format") if isinstance(mark, dict) else None
        if written != FORMAT and written not in READABLE:
            raise ConfigError(
                f"{folder.path}: written in a format that this version does not read ({mark!r:.80}); convert it again."
            )
        self.folder, self._manifest = folder, Manifest.read(folder.path)
        self.abstract = Decoder.abstract(family(folder.hugging_face.get("model_type")).config(folder.hugging_face))
        wanted = dict(leaf_paths(self.abstract))
        self._stored_paths = {
            path: path if written == FORMAT else old_path(path, folder.hugging_face) for path in wanted
        }
        self.leaves = self._check(wanted)

    def _part(self, part: str) -> Path:
        """Return the folder of a part's checkpoint."""
        return self.folder.path / WEIGHTS / part

    def _check(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Entry]:
        """Compare the stored leaves with the decoder's; return the shape and dtype of each stored leaf."""
        problems: list[str] = []
        stored: dict[str, Entry] = {}
        for part in parts(wanted):
            if not self._part(part).is_dir():
                problems.append(f"missing part {part}")
            else:
                # metadata first: of damaged ones the libraries raise anything
                self._check_sums(part, _METADATA)
                stored |= _entries(self._part(part))
        if not problems:
            expected = {self._stored_paths[path]: leaf.shape for path, leaf in wanted.items()}
            problems += [f"missing {path} {list(shape)}" for path, shape in expected.items() if path not in stored]
            problems += [f"unused {path} {list(entry.shape)}" for path, entry in stored.items() if path not in expected]
            problems += [
                f"misshapen {path}: the checkpoint has {list(stored[path].shape)}, the config wants {list(shape)}"
                for path, shape in expected.items()
                if path in stored and stored[path].shape != shape
            ]
        report(problems, f"{self.folder.path} does not fit its config")
        return {path: stored[self._stored_paths[path]] for path in wanted}

    def restore(
        self,
        part: str,
        dtype: np.dtype | None = None,
        shardings: Shardings | None = None,
        exact: Container[str] = (),
    ) -> dict[str, Any]:
        """Read the leaves of a part.

        Args:
            part: ``embedding``, one of ``layers.N``, or ``output``.
            dtype: cast every leaf to it; by default each keeps its stored dtype.
            shardings: the leaves that go to devices; the others are NumPy arrays.
            exact: the leaves that keep their stored dtype in any case.

        Returns:
            The leaves by their paths in the decoder.

        Raises:
            CheckpointError: the files are damaged, or change meanwhile.
        """
        import orbax.checkpoint as ocp

        self._check_sums(part)
        names = {path: self._stored_paths[path] for path in parts(self.leaves)[part]}
        args = {
            name: self._restore_args(path, None if path in exact else dtype, (shardings or {}).get(path))
            for path, name in names.items()
        }
        with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            try:
                restored = checkpointer.restore(self._part(part).absolute(), ocp.args.PyTreeRestore(restore_args=args))
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{self.folder.path}: {part} cannot be read: {first_line(error)}") from error
        self.folder.stamps.check(WEIGHTS)
        return {path: restored[name] for path, name in names.items()}

    def _check_sums(self, part: str, largest: int | None = None) -> None:
        """Compare the files of a part, up to ``largest`` bytes, with the manifest, if the folder has one."""
        if self._manifest is None:
            return
        if problems := self._manifest.damaged(self.folder.path, f"{WEIGHTS}/{part}/", largest):
            raise CheckpointError(
                f"{self.folder.path}: {part} is damaged: {problems[0]}. Convert the model again. (If you changed it on "
                f"purpose, remove {MANIFEST}.)"
            )

    def _restore_args(self, path: str, dtype: np.dtype | None, sharding: jax.sharding.Sharding | None) -> Any:
        import orbax.checkpoint as ocp

        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=self.leaves[path].shape, dtype=dtype)

    def decoder(self, dtype: DTypeLike | None = None, shardings: Shardings | None = None) -> Decoder:
        """Read all parts, one after the other, into a decoder.

        Args:
            dtype: cast every leaf to it; by default each keeps its stored dtype.
            shardings: the places of leaves on devices; a leaf that is not in it goes to the default device.

        Raises:
            CheckpointError: the files are damaged.
        """
        return jax.tree.unflatten(jax.tree.structure(self.abstract), self.read(dtype, shardings))

    def read(
        self,
        dtype: DTypeLike | None = None,
        shardings: Shardings | None = None,
        exact: Container[str] = (),
        change: Callable[[str, jax.Array], Any] = lambda path, leaf: leaf,
    ) -> list[jax.Array]:
        """Read all parts, one after the other; return the leaves in the order of the decoder's tree.

        Args:
            dtype, shardings: as in :meth:`decoder`.
            exact: the leaves that keep their stored dtype in any case.
            change: what to do with each leaf, by its path, before the next part is read.
        """
        dtype = None if dtype is None else np.dtype(dtype)
        leaves: dict[str, Any] = {}
        for part in parts(self.leaves):
            restored = self.restore(part, dtype, shardings, exact)
            while restored:
                path, leaf = restored.popitem()
                leaves[path] = change(path, jnp.asarray(leaf))
                del leaf
        return jax.tree.leaves([leaves[path] for path in self.leaves])


def _entries(path: Path) -> dict[str, Entry]:
    """Return shape and dtype of every leaf of a part."""
    import orbax.checkpoint as ocp

    try:
        with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute())
            tree = metadata.item_metadata.tree
            return {name: Entry(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in tree.items()}
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a complete Orbax checkpoint: {first_line(error)}") from error


def load_orbax(
    folder: Path | ModelFolder,
    dtype: DTypeLike | None = None,
    shardings: Shardings | Decoder | Callable[[Decoder], Shardings | Decoder] | None = None,
) -> Decoder:
    """Load the decoder of a folder that ``moejax convert`` wrote.

    Args:
        folder: the folder.
        dtype: cast every leaf to it; by default each keeps its stored dtype.
        shardings: the places of leaves on devices: a mapping from paths (``layers.0.feed_forward.down``) to
            ``jax.sharding.Sharding``, a decoder whose leaves are shardings, or a function that makes either from the
            abstract decoder. A device is given its part of a leaf and nothing else. Leaves without a sharding go to
            the default device.

    Raises:
        ConfigError: the configuration is not supported, or the folder's format is not.
        CheckpointError: the leaves do not fit it.
    """
    stored = OrbaxFolder(folder if isinstance(folder, ModelFolder) else ModelFolder.read(folder))
    if callable(shardings) and not isinstance(shardings, Decoder):
        shardings = shardings(stored.abstract)
    if isinstance(shardings, Decoder):
        shardings = dict(leaf_paths(shardings))
    return stored.decoder(dtype, shardings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what Orbax logs for every part, and the tracebacks that it logs of errors which it raises as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.level for logger in loggers], sys.unraisablehook

    def without_loops(said: Any) -> None:
        if "Event loop is closed" not in str(said.exc_value):
            hook(said)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_loops
    try:
        yield
    except Exception:
        # Orbax closes its loop after the first error, and the other writes complain when they are done
        time.sleep(_LAST_WRITES)
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if there is no message."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
