"""A folder that holds a model: where it is, and what its ``config.json`` says it is.

``open_folder(source)`` finds the folder and parses ``config.json`` once. Everything else in this room takes the
:class:`ModelFolder` that it returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from moejax.checkpoints.files import MARK, check_sizes, read_object
from moejax.checkpoints.safetensors import SafetensorsFolder
from moejax.errors import CheckpointError, ConfigError

PUBLISHED = ("*.json", "*.safetensors", "*.jinja")
"""The files of a model on the hub that are downloaded: never pickles, never code."""

BUNDLED = Path(__file__).parents[1] / "bundled"
"""The folder of the models that are installed with the package."""


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
    """

    path: Path
    kind: FolderKind
    hugging_face: Mapping[str, Any]
    mark: Any = None

    @classmethod
    def read(cls, path: Path) -> "ModelFolder":
        """Parse ``config.json`` of the folder ``path``.

        Raises:
            ConfigError: the file is missing or not a JSON object, or one of its sizes is not a positive integer.
            CheckpointError: the file is a link that leaves the folder.
        """
        config = read_object(path, "config.json", ConfigError)
        if config is None:
            raise ConfigError(f"{path}: no config.json; not a model folder.")
        check_sizes(config, f"{path}/config.json")
        kind = FolderKind.ORBAX if MARK in config else FolderKind.HUGGING_FACE
        mark = config.pop(MARK, None)
        return cls(path, kind, config, mark)

    @property
    def is_orbax(self) -> bool:
        """True if ``moejax convert`` wrote the folder."""
        return self.kind is FolderKind.ORBAX

    def tensors(self) -> SafetensorsFolder:
        """Open the safetensors files and read their headers; no data is read yet.

        Raises:
            CheckpointError: the folder holds Orbax checkpoints, or its safetensors files are missing or damaged.
        """
        if self.is_orbax:
            raise CheckpointError(f"{self.path} holds Orbax checkpoints, not safetensors files.")
        return SafetensorsFolder(self.path)


def open_folder(source: Any, files: Sequence[str] = PUBLISHED) -> ModelFolder:
    """Find the folder of a model and parse its ``config.json``.

    Args:
        source: a folder, a bundled name, a hub id, or a :class:`ModelFolder`, which is returned as it is.
        files: the patterns of the files to download if ``source`` is a hub id.

    Raises:
        CheckpointError: there is no such model, or ``config.json`` is a link that leaves the folder.
        ConfigError: ``config.json`` is missing or not a JSON object, or one of its sizes is not a positive integer.
    """
    return source if isinstance(source, ModelFolder) else ModelFolder.read(find(source, files))


def read_config(folder: Path) -> dict[str, Any]:
    """Parse the folder's ``config.json`` and leave out the mark of ``moejax convert``; raise as :func:`open_folder`."""
    return dict(ModelFolder.read(folder).hugging_face)


def find(source: Any, files: Sequence[str] = PUBLISHED) -> Path:
    """Return the local folder of a model: ``source`` itself, a bundled model, or a download from the hub.

    Raises:
        CheckpointError: there is no such model.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    bundled = BUNDLED / str(source)
    return bundled if bundled.is_dir() else download(str(source), files)


def download(name: str, files: Sequence[str] = PUBLISHED) -> Path:
    """Download the ``files`` of a model on the Hugging Face hub that are not in the local cache yet.

    Returns:
        The model's folder in the cache.

    Raises:
        CheckpointError: the hub has no such model or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is neither a folder nor a bundled model, and the hub could not provide it: {reason}"
        ) from error
