"""From a published checkpoint to a decoder on the device."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moejax.checkpoints.plan import make_plan
from moejax.checkpoints.safetensors import SafetensorsFolder, TensorSource
from moejax.checkpoints.torch import TorchModel
from moejax.errors import CheckpointError, ConfigError
from moejax.models import Decoder, family


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder}: no config.json; not a Hugging Face model folder.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds no JSON object.")
    return config


def load_decoder(hugging_face: dict[str, Any], source: TensorSource, dtype: DTypeLike | None = None) -> Decoder:
    """Build the decoder that ``hugging_face`` describes and fill it from ``source``, whose dtype it keeps by default.

    Raises:
        ConfigError: the configuration is not supported.
        CheckpointError: the tensors do not fit it.
    """
    kind = family(hugging_face.get("model_type"))
    abstract = Decoder.abstract(kind.config(hugging_face))
    leaves = [jnp.asarray(plan.read(source, dtype)) for plan in make_plan(abstract, kind.keys, source.entries)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def load_folder(folder: Path, dtype: DTypeLike | None = None) -> Decoder:
    """Load a Hugging Face folder: ``config.json`` and safetensors, sharded or not."""
    return load_decoder(read_config(folder), SafetensorsFolder(folder), dtype)


def load_torch(model: Any, dtype: DTypeLike | None = None) -> Decoder:
    """Load a ``transformers`` model that is in memory."""
    return load_decoder(model.config.to_dict(), TorchModel(model), dtype)


def download(name: str) -> Path:
    """The local folder of a model on the Hugging Face hub, downloading what is not there yet.

    Raises:
        CheckpointError: the name is neither a folder nor a model that can be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is no folder, no bundled model, and the hub did not give it: {reason}"
        ) from error
