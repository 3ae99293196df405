"""A folder that holds a model: where it is, and what its ``config.json`` says it is.

``open_folder(source)`` finds the folder and parses ``config.json`` once. Everything else in this room takes the
:class:`ModelFolder` that it returns.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from moejax.checkpoints.files import MARK, adapter_message, read_object, side_files
from moejax.checkpoints.hub import Hub, is_cached
from moejax.checkpoints.safetensors import SafetensorsFolder
from moejax.checkpoints.stamps import Stamps
from moejax.errors import CheckpointError, ConfigError
from moejax.models.kinds import check_generation, check_sizes

BUNDLED = Path(__file__).parents[1] / "bundled"
"""The folder of the models that are installed with the package."""

_MAX_CONFIG = 4_000_000
"""Most bytes of a config; a parsed one may take thirty times as much memory."""


class FolderKind(Enum):
    """How the weights of a folder are stored."""

    HUGGING_FACE = "Hugging Face files"
    ORBAX = "Orbax checkpoints"


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose ``config.json`` has been parsed.

    Attributes:
        path: the folder on this machine.
        kind: how its weights are stored.
        hugging_face: the fields of ``config.json``, without the mark that ``moejax convert`` adds.
        mark: that mark as it stands in the file, unchecked; ``None`` for Hugging Face files.
        stamps: its files as they were before the first was read.
    """

    path: Path
    kind: FolderKind
    hugging_face: Mapping[str, Any]
    mark: Any = None
    stamps: Stamps = field(kw_only=True, repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> "ModelFolder":
        """Parse ``config.json`` of the folder ``path``.

        Raises:
            ConfigError: the file is missing or not a JSON object, or one of its sizes is not a positive integer.
            CheckpointError: the file is a link that leaves the folder.
        """
        stamps = Stamps(path)
        config = read_object(path, "config.json", ConfigError, _MAX_CONFIG)
        if config is None:
            adapter = (path / "adapter_config.json").is_file()
            raise ConfigError(adapter_message(path) if adapter else f"{path}: no config.json; not a model folder.")
        check_sizes(config, f"{path}/config.json")
        kind = FolderKind.ORBAX if MARK in config else FolderKind.HUGGING_FACE
        mark = config.pop(MARK, None)
        return cls(path, kind, config, mark, stamps=stamps)

    @property
    def is_orbax(self) -> bool:
        """True if ``moejax convert`` wrote the folder."""
        return self.kind is FolderKind.ORBAX

    @cached_property
    def side_files(self) -> list[str]:
        """The names of the files beside config and weights (:func:`moejax.checkpoints.files.side_files`)."""
        return side_files(self.path)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The fields of ``generation_config.json``; empty if there is none.

        Raises:
            ConfigError: the file is not a JSON object, or a field is of another kind.
            CheckpointError: it is a link that leaves the folder.
        """
        name = "generation_config.json"
        config = read_object(self.path, name, ConfigError, _MAX_CONFIG) or {}
        check_generation(config, f"{self.path}/{name}")
        return config

    def tensors(self) -> SafetensorsFolder:
        """Open the safetensors files and read their headers; no data is read yet.

        Raises:
            CheckpointError: the folder holds Orbax checkpoints, or its safetensors files are missing or damaged.
        """
        if self.is_orbax:
            raise CheckpointError(f"{self.path} holds Orbax checkpoints, not safetensors files.")
        return SafetensorsFolder(self.path)


def open_folder(source: Any, files: Sequence[str] | None = None, hub: Hub = Hub()) -> ModelFolder:
    """Find the folder of a model and parse its ``config.json``.

    Args:
        source: a folder, a bundled name, a hub id, or a :class:`ModelFolder`, which is returned as it is.
        files: the patterns of the files to download if ``source`` is a hub id; by default all that the model needs.
        hub: how a hub id is downloaded.

    Raises:
        CheckpointError: there is no such model, or ``config.json`` is a link that leaves the folder.
        ConfigError: ``config.json`` is missing or not a JSON object, or one of its sizes is not a positive integer.
    """
    return source if isinstance(source, ModelFolder) else ModelFolder.read(find(source, files, hub))


def read_config(folder: Path) -> dict[str, Any]:
    """Parse the folder's ``config.json`` and leave out the mark of ``moejax convert``; raise as :func:`open_folder`."""
    return dict(ModelFolder.read(folder).hugging_face)


def find(source: Any, files: Sequence[str] | None = None, hub: Hub = Hub()) -> Path:
    """Return the local folder of a model: ``source`` itself, a bundled model, or a download from the hub.

    The arguments are as in :func:`open_folder`.

    Raises:
        CheckpointError: there is no such model.
    """
    if not isinstance(source, str | os.PathLike) or isinstance(os.fspath(source), bytes):
        raise CheckpointError(
            f"{source!r:.80} is no model: give a folder, a bundled name, a hub id, or a transformers model in memory."
        )
    try:
        folder = Path(source).expanduser()
        if folder.is_dir():
            return folder
        is_file = folder.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, an unknown home
        raise CheckpointError(f"{str(source)!r:.200} is no path: {error}.") from error
    if is_file:
        raise CheckpointError(f"{folder}: a file; give the folder that holds config.json and the weights.")
    bundled = BUNDLED / str(source)
    if bundled.is_dir():
        return bundled
    name = str(source)
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name:
        raise CheckpointError(f"{source}: no such folder{_near(folder)}.")
    try:
        return hub.download(name, files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_near(folder)}") from error


def is_on_disk(source: str | Path) -> bool:
    """Return whether :func:`find` needs no hub for it: a path, a bundled name, or a hub id of which there is a copy."""
    if Path(source).expanduser().exists() or (BUNDLED / str(source)).is_dir():
        return True
    return is_cached(str(source))


def bundled_names() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())


def _near(folder: Path) -> str:
    """Return a hint that names a folder or bundled model of nearly the same name; empty if there is none."""
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, [*bundled_names(), *siblings], n=1, cutoff=0.75)
    return f" (did you mean {close[0]!r}?)" if close else ""
