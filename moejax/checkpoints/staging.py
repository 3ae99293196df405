"""Make a folder that is complete or absent, one writer at a time, without touching what is not ours.

A folder is made as ``<destination>.partial`` and renamed at the end. From its first moment the partial folder has a
manifest (:mod:`moejax.checkpoints.manifest`), which is the mark that it is ours and lists what in it is. A folder
without such a mark, or with anything else in it, is refused and left alone. What was written is read back before the
rename.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.checkpoints.files import MANIFEST, walk, write_object
from moejax.checkpoints.manifest import Checksum, Manifest, checksums
from moejax.errors import CheckpointError
from moejax.writing import TEMPORARY, lock_beside, locked, naming, remove_temporaries, replacing

_UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax puts behind the name of a folder that it has not finished."""


def need_room(folder: Path, sizes: Iterable[int]) -> None:
    """Raise ``CheckpointError`` if the disk of ``folder`` has no room for files of these sizes."""
    block = 4096  # what a file takes at least, on most disks
    need = sum(-(-size // block) * block for size in sizes)
    if (free := shutil.disk_usage(folder).free) < need:
        raise CheckpointError(f"{folder}: {need:,} bytes are needed, but the disk has only {free:,} left.")


@contextlib.contextmanager
def making(destination: Path) -> Iterator[None]:
    """Hold the lock of a folder that is to be made.

    Raises:
        CheckpointError: its parent is not a folder, or its path has a NUL.
        BusyError: another run is making it.
    """
    if "\0" in str(destination):
        raise CheckpointError(f"cannot write {destination}: a path has no NUL.")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {destination}: its parent is not a folder.")
    with locked(lock_beside(destination), destination):
        yield


def is_made(destination: Path, about: Mapping[str, Any]) -> bool:
    """Return whether the folder is there already, made from the same by an earlier run, and undamaged.

    Args:
        destination: the folder.
        about: what it is to be made from.

    Raises:
        CheckpointError: there is something else.
    """
    if not os.path.lexists(destination):
        return False
    mend = "remove it, or choose another destination"
    manifest = Manifest.read(destination) if destination.is_dir() else None
    if manifest is None or not manifest.complete:
        raise CheckpointError(f"{destination} exists already; {mend}.")
    if manifest.about != about:
        raise CheckpointError(f"{destination} exists already, made from another source or with other options; {mend}.")
    if problems := manifest.damaged(destination):
        raise CheckpointError(f"{destination} exists already, but is not as it was written ({problems[0]}); {mend}.")
    return True


@dataclass
class Staging:
    """A partial folder, while it is written.

    Attributes:
        folder: where to write.
        manifest: its manifest.
        expected: size and CRC-32 that files must have when they are read back, by their paths below the folder.
    """

    folder: Path
    manifest: Manifest
    expected: dict[str, Checksum] = field(default_factory=dict)

    def declare(self, *names: str) -> None:
        """Say that these names directly in the folder, or in a folder of it, are or will be ours.

        What is declared may be removed by a later run; nothing else is.
        """
        if new := [name for name in names if name not in self.manifest.made]:
            self.manifest.made += new
            self.manifest.write(self.folder)

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object into the file ``name``."""
        self.declare(name)
        write_object(self.folder / name, value)

    def copy(self, source: Path, names: Iterable[str]) -> None:
        """Copy files of the folder ``source``."""
        names = list(names)
        self.declare(*names)
        self.expected |= checksums(source, names)
        for name in names:
            with replacing(self.folder / name) as temporary:
                shutil.copyfile(source / name, temporary)

    def record(self, name: str) -> None:
        """Note the checksums of the files of the finished subfolder ``name``, so that a later run can keep it."""
        below = [path.relative_to(self.folder).as_posix() for path in walk(self.folder, name)]
        self.manifest.files |= checksums(self.folder, below)
        self.manifest.write(self.folder)

    def has(self, name: str) -> bool:
        """Return whether the subfolder ``name`` was finished by an earlier run and is as it was written."""
        under = f"{name}/"
        recorded = any(file.startswith(under) for file in self.manifest.files)
        return recorded and not self.manifest.damaged(self.folder, under)

    def forget(self, name: str) -> None:
        """Remove what an earlier run left of the subfolder ``name``."""
        files = {file: value for file, value in self.manifest.files.items() if not file.startswith(f"{name}/")}
        if files.keys() != self.manifest.files.keys():
            self.manifest.files = files
            self.manifest.write(self.folder)
        for left in (self.folder / name, *(self.folder / name).parent.glob(f"{Path(name).name}{_UNFINISHED}*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)

    def finish(self) -> None:
        """Read back the files that were not recorded yet, and complete the manifest.

        Raises:
            CheckpointError: a file is gone, or reads back differently from what was written.
        """
        remove_temporaries(self.folder)
        top = [name for name in self.manifest.made if "/" not in name and (self.folder / name).exists()]
        found = [path for name in top if (self.folder / name).is_dir() for path in walk(self.folder, name)]
        found += [self.folder / name for name in top if (self.folder / name).is_file()]
        names = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}
        recorded = {name: value for name, value in self.manifest.files.items() if names.get(name) == value[0]}
        read = recorded | checksums(self.folder, names.keys() - recorded.keys())
        wanted = self.manifest.files | self.expected
        if wrong := [name for name, value in wanted.items() if read.get(name) != value]:
            raise CheckpointError(f"{self.folder / wrong[0]}: reads back differently from what was written.")
        self.manifest.files, self.manifest.complete = dict(sorted(read.items())), True
        self.manifest.write(self.folder)


@contextlib.contextmanager
def staged(destination: Path, about: Mapping[str, Any], *, resumes: bool = False) -> Iterator[Staging]:
    """Yield the folder ``<destination>.partial``, and rename it to ``destination`` when the block ends without error.

    The caller holds the lock (:func:`making`), and the destination does not exist.

    Args:
        destination: the folder to make.
        about: what it is made from. A partial folder that an earlier run made from something else is removed first.
        resumes: whether a partial folder from the same may be continued, and is left if the block fails.

    Raises:
        CheckpointError: the partial folder is not ours, or a file reads back differently from what was written.
    """
    partial = destination.with_name(destination.name + ".partial")
    if os.path.lexists(partial):
        manifest = _ours(partial)
        if not resumes or manifest.about != about:
            _remove(partial, manifest)
    if not partial.exists():
        _begin(partial, Manifest(about))
    staging = Staging(partial, _ours(partial))
    try:
        with naming(partial):
            yield staging
            staging.finish()
    except BaseException:
        if not resumes:
            _remove(partial, staging.manifest)
        raise
    if os.path.lexists(destination):
        # somebody who does not know of the lock
        raise CheckpointError(
            f"{destination} has appeared meanwhile; {partial} is complete: move it where you want it."
        )
    os.rename(partial, destination)


def _unmarked(partial: Path) -> Path:
    """Return where a partial folder is before it has a manifest, and after."""
    return partial.with_name(f".{partial.name}")


def _begin(partial: Path, manifest: Manifest) -> None:
    """Make a partial folder, which appears with its manifest in it."""
    new = _unmarked(partial)
    # it exists if a run was killed here, or at the end of _remove
    if os.path.lexists(new) and (new.is_symlink() or not new.is_dir() or _foreign(new, [])):
        raise CheckpointError(f"{new} is in the way, and moejax did not make it; move it away.")
    new.mkdir(exist_ok=True)
    try:
        remove_temporaries(new)
        manifest.write(new)
        os.rename(new, partial)
    except OSError:
        with contextlib.suppress(OSError):
            new.rmdir()
        raise


def _ours(partial: Path) -> Manifest:
    """Return the manifest of a partial folder.

    Raises:
        CheckpointError: it is not ours, or has something in it that is not.
    """
    mend = "move it away, or choose another destination"
    manifest = Manifest.read(partial) if partial.is_dir() and not partial.is_symlink() else None
    if manifest is None:
        raise CheckpointError(f"{partial} is in the way, and this version of moejax did not make it; {mend}.")
    if foreign := _foreign(partial, manifest.made):
        raise CheckpointError(f"{partial} holds {foreign[0]!r:.80}, which moejax did not write; {mend}.")
    return manifest


def _foreign(partial: Path, made: list[str]) -> list[str]:
    """Return what is in a partial folder, or in the folders in it, and was not declared."""
    names = [entry.name for entry in os.scandir(partial)]
    for folder in {name.split("/")[0] for name in made if "/" in name}:
        if (partial / folder).is_dir():
            names += [f"{folder}/{entry.name}" for entry in os.scandir(partial / folder)]
    known = {MANIFEST, *made}
    return sorted(n for n in names if n.partition(_UNFINISHED)[0] not in known and not n.startswith(TEMPORARY))


def _remove(partial: Path, manifest: Manifest) -> None:
    """Remove what is ours of a partial folder, the manifest last; what is not ours stays, and the folder with it."""
    remove_temporaries(partial)
    if _foreign(partial, manifest.made):
        return
    for name in manifest.made:
        path = partial / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not os.path.lexists(_unmarked(partial)):
        os.rename(partial, _unmarked(partial))
        (_unmarked(partial) / MANIFEST).unlink()
        _unmarked(partial).rmdir()
