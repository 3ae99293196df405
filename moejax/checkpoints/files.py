"""Read the files of an untrusted folder, and write a folder that is either complete or absent.

A model folder comes from strangers. Its JSON is parsed strictly, and its files must lie inside it: a link out of the
folder could make ``moejax convert`` copy one of the user's private files into a model that is then published. One kind
of link out of the folder is allowed, because every download has it: in the Hugging Face cache, the files of
``models--name/snapshots/revision`` are links into ``models--name/blobs``. For such a folder, files may lie anywhere
inside ``models--name``. The folder itself may be a link, since the user named it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moejax.errors import CheckpointError, MoejaxError

_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".spm", ".bpe")
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NO_SIDE_FILES = ("config.json", "adapter_config.json")
_NO_SIDE_SUFFIXES = (".index.json", ".partial")
_MAX_JSON = 100_000_000
"""Most bytes of a JSON file."""

LFS_MARK = b"version https://git-lfs"
"""The beginning of a file that Git LFS has not downloaded."""

LFS_MEND = "a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder."
"""What a message says of such a file."""

MARK = "moejax"
"""The field that ``moejax convert`` adds to the config of a folder that it writes: a dict with format and dtype."""


def parse_object(data: bytes, where: str, error: type[MoejaxError]) -> dict[str, Any]:
    """Parse a JSON object strictly: it must be UTF-8, and no key may occur twice in an object.

    Args:
        data: the text.
        where: the file, as the error message names it.
        error: the class of the error that is raised.

    Raises:
        error: ``data`` is not such an object.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise _DuplicateKeyError(key)
            fields[key] = value
        return fields

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except _DuplicateKeyError as duplicate:
        raise error(f"{where}: the key {duplicate.args[0]!r:.80} occurs twice.") from None
    except UnicodeDecodeError as reason:
        raise error(f"{where}: not valid JSON: byte {reason.start} is not valid UTF-8.") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON: {reason}.") from None
    if not isinstance(value, dict):
        raise error(f"{where}: not a JSON object.")
    return value


class _DuplicateKeyError(Exception):
    """An object has a key twice; the argument is the key."""


def read_object(folder: Path, name: str, error: type[MoejaxError], most: int = _MAX_JSON) -> dict[str, Any] | None:
    """Parse the JSON object in the file ``name`` of ``folder``; return ``None`` if there is no such file.

    Args:
        folder: the model's folder.
        name: the file.
        error: the class of the error that is raised for what it holds.
        most: most bytes of the file.

    Raises:
        CheckpointError: the file is a link that leaves the folder.
        error: the file is too large, or is not a JSON object.
    """
    path = inside(folder, name)
    if path is None:
        return None
    if (size := path.stat().st_size) > most:
        raise error(f"{path}: {size} bytes are too many for a JSON file; it is damaged or hostile.")
    data = path.read_bytes()
    if is_lfs_pointer(data):
        raise error(f"{path}: {LFS_MEND}")
    return parse_object(data, str(path), error)


def inside(folder: Path, name: str) -> Path | None:
    """Return the path of the file ``name`` directly in ``folder``, or ``None`` if there is no such file.

    Raises:
        CheckpointError: ``name`` has path separators, is not a regular file, or is a link that leaves the folder.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise CheckpointError(
            f"{folder}: {name!r:.80} is not the name of a file in the folder; the checkpoint is hostile."
        )
    path = folder / name
    if not path.exists():
        return None
    real = path.resolve()
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file.")
    if not real.is_relative_to(_boundary(folder.resolve())):
        raise CheckpointError(
            f"{path}: a link that leaves its folder, to {real}. If you trust the file, copy it into the folder."
        )
    return path


def _boundary(folder: Path) -> Path:
    """Return the folder in which the files of a model folder must lie (see the docstring of this module)."""
    repository = folder.parent.parent
    cached = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if cached else folder


def copy_side_files(source: Path, destination: Path) -> None:
    """Copy what a model folder holds beside config and weights: tokenizer, chat templates, notes, licence.

    Code and weights of other kinds are left out, and so is what the destination has already.
    """
    for name in side_files(source):
        if (path := inside(source, name)) is not None and not (destination / name).exists():
            shutil.copyfile(path, destination / name)


def side_files(folder: Path) -> list[str]:
    """Return the names of the files beside config and weights."""
    return sorted(path.name for path in folder.iterdir() if _is_side_file(path.name) and path.is_file())


def _is_side_file(name: str) -> bool:
    if name.startswith(".") or name in _NO_SIDE_FILES or name.endswith(_NO_SIDE_SUFFIXES):
        return False
    return name.endswith(_SIDE_SUFFIXES) or name.upper().startswith(_SIDE_NAMES)


def is_lfs_pointer(beginning: bytes) -> bool:
    """Return whether a file that begins like this is a pointer of Git LFS, which stands for a file not downloaded."""
    return beginning.startswith(LFS_MARK)


def adapter_message(folder: Path) -> str:
    """Return the error message for a folder that holds an adapter instead of a model."""
    adapter = read_object(folder, "adapter_config.json", CheckpointError) or {}
    base = adapter.get("base_model_name_or_path")
    return (
        f"{folder}: an adapter for {base!r:.120}, not a model; merge it first: AutoPeftModelForCausalLM"
        f".from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('MERGED'), then load MERGED."
    )


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to the file ``path``, which appears only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def refuse_existing(destination: Path) -> None:
    """Raise ``CheckpointError`` if ``destination`` exists already, or if its parent is not a folder."""
    if "\0" in str(destination):
        raise CheckpointError(f"cannot write {destination}: a path has no NUL.")
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; remove it, or choose another destination.")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {destination}: its parent is not a folder.")


def need_room(folder: Path, size: int) -> None:
    """Raise ``CheckpointError`` if the disk of ``folder`` has fewer than ``size`` bytes left."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise CheckpointError(f"{folder}: {size:,} bytes are needed, but the disk has only {free:,} left.")


@contextmanager
def staged(destination: Path, *, keep: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """Yield the folder ``<destination>.partial``, and rename it to ``destination`` when the block ends without error.

    Args:
        destination: the folder to make.
        keep: tells whether a partial folder that an earlier run left may be continued; otherwise it is removed first.

    Raises:
        CheckpointError: the destination exists or cannot be made.
    """
    refuse_existing(destination)
    partial = destination.with_name(destination.name + ".partial")
    if partial.exists() and not keep(partial):
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    yield partial
    os.rename(partial, destination)
