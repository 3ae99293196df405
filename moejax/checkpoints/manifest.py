"""Manifests: from what a folder of ours was made, and the checksums of its files.

Arrays on disk can rot, and neither zarr nor Orbax notices a bit that has flipped in one. So a folder that moejax writes
has a file ``moejax.json`` with size and CRC-32 of every file. CRC-32 finds every burst of up to 32 bits and misses one
in four billion other changes; it is a guard against accidents, not against malice. Folders of versions before it have
no manifest, and are read as they are.
"""

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.checkpoints.files import MANIFEST, read_object, write_object
from moejax.errors import CheckpointError

VERSION = 1
"""The version of the form of a manifest."""

_PIECE = 4 << 20
"""The number of bytes that a thread reads at a time."""

_MOST_THREADS = 8

Checksum = tuple[int, int]
"""Size and CRC-32 of a file."""


def checksum(path: Path) -> Checksum:
    """Return size and CRC-32 of a file."""
    size, crc, buffer = 0, 0, memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc = size + count, zlib.crc32(buffer[:count], crc)
    return size, crc


def checksums(folder: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Return the checksums of files by their paths below ``folder``; several are read at once."""
    names = sorted(names)
    # zlib computes without Python's lock
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(lambda name: checksum(folder / name), names), strict=True))


@dataclass
class Manifest:
    """What a folder of ours says about itself.

    Attributes:
        about: what made it: the command, its source and its options.
        files: checksums of its files, by their paths below the folder, with ``/`` between.
        made: the names directly in the folder that are ours, or will be.
        complete: whether the folder was finished.
    """

    about: Mapping[str, Any]
    files: dict[str, Checksum] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Read the manifest of a folder; return ``None`` if there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        fields = read_object(folder, MANIFEST, CheckpointError)
        if fields is None:
            return None
        about, files, made = (fields.get(name) for name in ("about", "files", "made"))
        if not isinstance(about, dict) or not isinstance(files, dict) or not isinstance(made, list):
            raise CheckpointError(f"{folder / MANIFEST}: damaged: not a manifest of moejax.")
        if not all(_is_below(name) for name in (*files, *made)) or not all(map(_is_checksum, files.values())):
            raise CheckpointError(f"{folder / MANIFEST}: damaged: it names no files, or no checksums.")
        return cls(
            about, {name: (size, crc) for name, (size, crc) in files.items()}, made, fields.get("complete") is True
        )

    def write(self, folder: Path) -> None:
        """Write the manifest into its folder, in place of an earlier one."""
        fields = {"version": VERSION, "about": self.about, "complete": self.complete, "made": self.made}
        write_object(folder / MANIFEST, fields | {"files": self.files})

    def damaged(self, folder: Path, under: str = "", largest: int | None = None) -> list[str]:
        """Return what is wrong with the files whose paths begin with ``under``, each with its name.

        Args:
            folder: the folder.
            under: the beginning of the paths.
            largest: leave out files of more bytes.
        """
        files = {name: value for name, value in self.files.items() if name.startswith(under)}
        listed = {name: value for name, value in files.items() if largest is None or value[0] <= largest}
        sizes = {name: _size(folder / name) for name in listed}
        problems = [f"{name} is missing" for name in listed if sizes[name] is None]
        problems += [
            f"{name} has {sizes[name]} bytes, not {size}"
            for name, (size, _) in listed.items()
            if sizes[name] not in (None, size)
        ]
        whole = [name for name, (size, _) in listed.items() if sizes[name] == size]
        found = checksums(folder, whole)
        return problems + [f"{name} has changed since it was written" for name in whole if found[name] != listed[name]]


def _size(path: Path) -> int | None:
    """Return the size of a regular file; ``None`` for anything else."""
    return path.stat().st_size if path.is_file() else None


def _is_checksum(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def _is_below(name: Any) -> bool:
    """Return whether this is a path that stays below its folder."""
    return isinstance(name, str) and all(
        step not in ("", ".", "..") and "\0" not in step and "\\" not in step for step in name.split("/")
    )
