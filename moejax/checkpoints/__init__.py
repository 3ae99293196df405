"""Published files to pytrees and back."""

from moejax.checkpoints.export import save_folder, to_tensors
from moejax.checkpoints.load import download, load_decoder, load_folder, load_torch, read_config

__all__ = ["download", "load_decoder", "load_folder", "load_torch", "read_config", "save_folder", "to_tensors"]
