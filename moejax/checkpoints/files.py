"""Reading the files of a folder that nobody vouches for, and writing a folder that is either complete or absent.

A model folder comes from strangers. Its JSON is parsed strictly, and its files must lie inside it: a link out of the
folder could make ``moejax convert`` copy a private file of the user's into a model that is then published. One link
that leaves is allowed, because every download has it: the Hugging Face cache keeps ``models--name/snapshots/revision``
as links into ``models--name/blobs``, so there the whole of ``models--name`` counts as the folder. The folder itself
may be a link, since the user named it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moejax.errors import CheckpointError, ConfigError, MoejaxError

_SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_MAX_JSON = 100_000_000

MARK = "moejax"
"""The field of a config that says that ``moejax convert`` wrote the folder."""

# Above everything that was published by far; a config that claims more would cost memory before anything else fails.
_LIMITS = {"num_hidden_layers": 10_000, "num_experts": 100_000, "num_local_experts": 100_000, "vocab_size": 2**31}
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads")


def parse_object(data: bytes, where: str, error: type[MoejaxError]) -> dict[str, Any]:
    """The JSON object that ``data`` holds: UTF-8, no key twice.

    Raises:
        error: it holds none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _TwiceError(key)
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except _TwiceError as twice:
        raise error(f"{where}: the key {twice.args[0]!r:.80} stands there twice.") from None
    except UnicodeDecodeError as reason:
        raise error(f"{where}: not valid JSON: byte {reason.start} is no UTF-8.") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not valid JSON: {reason}.") from None
    if not isinstance(value, dict):
        raise error(f"{where}: holds no JSON object.")
    return value


class _TwiceError(Exception):
    """A key that an object has twice."""


def read_object(folder: Path, name: str, error: type[MoejaxError]) -> dict[str, Any] | None:
    """The JSON object in a file of ``folder``; ``None`` if there is no such file.

    Raises:
        CheckpointError: the file is a link that leaves the folder.
        error: the file is no JSON object.
    """
    path = inside(folder, name)
    if path is None:
        return None
    if (size := path.stat().st_size) > _MAX_JSON:
        raise error(f"{path}: {size} bytes are too many for a JSON file; it is damaged or hostile.")
    return parse_object(path.read_bytes(), str(path), error)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``, without the mark of ``moejax convert``.

    Raises:
        ConfigError: there is none, or it is no JSON object, or a size in it is none.
        CheckpointError: it is a link out of the folder.
    """
    config = read_object(folder, "config.json", ConfigError)
    if config is None:
        raise ConfigError(f"{folder}: no config.json; not a model folder.")
    for name, limit in (_LIMITS | dict.fromkeys(_SIZES, 2**24)).items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= limit):
            raise ConfigError(f"{folder}/config.json: {name}={value!r:.40} is no number from 1 to {limit}.")
    return {key: value for key, value in config.items() if key != MARK}


def inside(folder: Path, name: str) -> Path | None:
    """The file ``name`` directly in ``folder``, or ``None`` if it is not there.

    Raises:
        CheckpointError: ``name`` is a path, or leads to something that is no file, or out of the folder.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise CheckpointError(f"{folder}: {name!r:.80} names no file in the folder; the checkpoint is hostile.")
    path = folder / name
    if not path.exists():
        return None
    real = path.resolve()
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file.")
    if not real.is_relative_to(_home(folder.resolve())):
        raise CheckpointError(
            f"{path}: a link that leaves its folder, to {real}. Copy the file there, if you trust it."
        )
    return path


def _home(folder: Path) -> Path:
    """The folder that the files of a model folder must lie in: see the module's text."""
    repository = folder.parent.parent
    cached = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if cached else folder


def copy_side_files(source: Path, destination: Path) -> None:
    """Copy the tokenizer and what else belongs to the model but is neither weights nor architecture."""
    for name in _SIDE_FILES:
        if (path := inside(source, name)) is not None:
            shutil.copyfile(path, destination / name)


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write JSON; the file appears only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def refuse_existing(destination: Path) -> None:
    """Raise ``CheckpointError`` if something stands where a folder is to be made, or it cannot be made there."""
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; remove it, or choose another destination.")
    if not destination.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {destination}: its parent is no folder.")


def need_room(folder: Path, size: int) -> None:
    """Raise ``CheckpointError`` if the disk of ``folder`` has no ``size`` bytes left."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise CheckpointError(f"{folder}: {size:,} bytes are to be written, and the disk has {free:,} left.")


@contextmanager
def staged(destination: Path, *, keep: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """``<destination>.partial`` to fill; it becomes ``destination`` when the block ends without an error.

    A partial folder that an earlier run left is kept if ``keep`` says so of it, else removed first.

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
