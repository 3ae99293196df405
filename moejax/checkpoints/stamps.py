"""Notice that files change while they are read, so that no model is half of one download and half of another."""

import os
from collections.abc import Mapping
from pathlib import Path

from moejax.checkpoints.files import is_side_file, walk
from moejax.errors import CheckpointError

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size, and the times of the last change of a file's content and of its entry."""


def stamp(status: os.stat_result) -> Stamp:
    """Return what changes when another file takes the place of this one, or when it is written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def changed(path: Path) -> CheckpointError:
    """Return the error for a file that changed while it was read."""
    return CheckpointError(f"{path}: changed while the model was read; start again once nothing writes to it.")


class Stamps:
    """The files of a model folder that are read, as they were when it was opened.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._files, self._trees = folder, _stamps(folder), dict[str, Mapping[Path, Stamp]]()

    def add(self, name: str) -> None:
        """Watch the subfolder ``name`` too.

        Raises:
            CheckpointError: something in it is not a regular file, or is a link that leaves the folder.
        """
        self._trees[name] = _tree(self._folder, name)

    def sizes_and_times(self) -> dict[str, list[int]]:
        """Return size and time of the last change of each file that is watched, by its path below the folder."""
        files = dict(self._files)
        for tree in self._trees.values():
            files |= tree
        return {path.relative_to(self._folder).as_posix(): [s, time] for path, (_, _, s, time, _) in files.items()}

    def check(self, name: str | None = None) -> None:
        """Raise ``CheckpointError`` if a file has changed, come or gone; with ``name``, in that subfolder alone."""
        pairs = [(self._trees[tree], _tree(self._folder, tree)) for tree in ([name] if name else self._trees)]
        if name is None:
            pairs.append((self._files, _stamps(self._folder)))
        for before, now in pairs:
            if before != now:
                raise changed(min(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)))


def _stamps(folder: Path) -> Mapping[Path, Stamp]:
    """Return the stamps of config, weights and side files directly in a folder; notes for people do not count."""
    found = {}
    for name in os.listdir(folder) if folder.is_dir() else ():
        counts = name.endswith((".safetensors", ".json")) or (is_side_file(name) and not name.endswith(".md"))
        if counts and not name.startswith(".") and os.path.isfile(folder / name):
            found[folder / name] = stamp(os.stat(folder / name))
    return found


def _tree(folder: Path, name: str) -> Mapping[Path, Stamp]:
    return {path: stamp(path.stat()) for path in walk(folder, name)}
