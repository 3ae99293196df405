"""Read the files of an untrusted folder.

A model folder comes from strangers. Its JSON is parsed strictly, and its files must lie inside it: a link out of the
folder could make ``moejax convert`` copy one of the user's private files into a model that is then published. One kind
of link out of the folder is allowed, because every download has it: in the Hugging Face cache, the files of
``models--name/snapshots/revision`` are links into ``models--name/blobs``. For such a folder, files may lie anywhere
inside ``models--name``. The folder itself may be a link, since the user named it. What is under a file's name must be a
regular file: to open a pipe would wait for ever.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.errors import CheckpointError, MoejaxError
from moejax.writing import write_file

MANIFEST = "moejax.json"
"""The file of a folder of ours that says from what it was made, and the checksums of its files."""

_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".spm", ".bpe")
_SIDE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_NO_SIDE_FILES = ("config.json", "adapter_config.json", MANIFEST)
_NO_SIDE_SUFFIXES = (".index.json", ".partial")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".py")
"""Ends of the names of weights and code, which no tokenizer is read from."""

_TEMPLATES = "additional_chat_templates"
"""The subfolder with further chat templates that transformers reads."""

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
        CheckpointError: ``name`` has path separators, is not a regular file, or is a link that leaves the folder or
            leads nowhere.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise CheckpointError(
            f"{folder}: {name!r:.80} is not the name of a file in the folder; the checkpoint is hostile."
        )
    path = folder / name
    if not os.path.lexists(path):
        return None
    _check_kind(path, folder)
    return path


def _check_kind(path: Path, folder: Path) -> None:
    """Raise ``CheckpointError`` unless ``path`` is a regular file, or a link to one that counts as inside."""
    real = Path(os.path.realpath(path))
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file{_leads(path, real)}.")
    _check_place(path, real, folder)


def _leads(path: Path, real: Path) -> str:
    """Return where a link leads that does not end at a file; empty for what is no link."""
    return f", but a link to {real}" if path.is_symlink() else ""


def _check_place(path: Path, real: Path, folder: Path) -> None:
    if not real.is_relative_to(_boundary(folder.resolve())):
        # the mend is to put the file itself there, if it is to be trusted
        raise CheckpointError(f"{path}: a link out of its folder, to {real}; copy it in.")


def walk(folder: Path, name: str) -> list[Path]:
    """Return the files of the subfolder ``name`` of ``folder`` and of the folders in it, sorted.

    Raises:
        CheckpointError: something in it is neither folder nor regular file, or is a link that leaves ``folder``.
    """
    found: list[Path] = []
    todo, seen = [folder / name], set[Path]()
    while todo:
        current = todo.pop()
        real = Path(os.path.realpath(current))
        _check_place(current, real, folder)
        if real in seen:
            continue
        seen.add(real)
        for path in current.iterdir():
            if path.is_dir():
                todo.append(path)
            else:
                _check_kind(path, folder)
                found.append(path)
    return sorted(found)


def _boundary(folder: Path) -> Path:
    """Return the folder in which the files of a model folder must lie (see the docstring of this module)."""
    repository = folder.parent.parent
    cached = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if cached else folder


def side_files(folder: Path) -> list[str]:
    """Return the names of the files beside config and weights: tokenizer, chat templates, notes, licence.

    Code and weights of other kinds are not among them.

    Raises:
        CheckpointError: one of them is not a regular file, or is a link that leaves the folder.
    """
    names = sorted(name for name in os.listdir(folder) if is_side_file(name))
    return [name for name in names if not _is_folder_of_licences(folder / name) and inside(folder, name)]


def _is_folder_of_licences(path: Path) -> bool:
    """Return whether this is a folder as the REUSE convention has it, whose name is no file's."""
    return path.is_dir() and not path.name.endswith(_SIDE_SUFFIXES)


def check_read_by_others(folder: Path) -> None:
    """Check every file that another library may read when it is given a model folder, weights excepted.

    Raises:
        CheckpointError: one of them is not a regular file, or is a link that leaves the folder.
    """
    for name in sorted(os.listdir(folder)):
        is_plain_folder = (folder / name).is_dir() and not name.endswith(_SIDE_SUFFIXES)
        if not is_plain_folder and not name.startswith(".") and not name.endswith(_WEIGHT_SUFFIXES):
            inside(folder, name)
    if (folder / _TEMPLATES).is_dir():
        walk(folder, _TEMPLATES)


def is_side_file(name: str) -> bool:
    """Return whether a file of this name stands beside config and weights."""
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


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to the file ``path``, which appears only when it is complete."""
    write_file(path, json.dumps(value, indent=2) + "\n")
