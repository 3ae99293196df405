"""Load published files into decoders, convert them to Orbax folders, and write them back."""

from moejax.checkpoints.convert import convert
from moejax.checkpoints.describe import ModelConfig, get_model_config, list_supported_models
from moejax.checkpoints.export import export, save_folder, to_tensors
from moejax.checkpoints.folder import BUNDLED, ModelFolder, find, open_folder, read_config
from moejax.checkpoints.hub import Hub, download
from moejax.checkpoints.load import load_decoder, load_folder, load_torch
from moejax.checkpoints.orbax import load_orbax
from moejax.checkpoints.summary import Conversion

__all__ = [
    "BUNDLED",
    "Conversion",
    "Hub",
    "ModelConfig",
    "ModelFolder",
    "convert",
    "download",
    "export",
    "find",
    "get_model_config",
    "list_supported_models",
    "load_decoder",
    "load_folder",
    "load_orbax",
    "load_torch",
    "open_folder",
    "read_config",
    "save_folder",
    "to_tensors",
]
