"""A decoder as Hugging Face files: the key tables read backwards."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moejax.checkpoints.plan import layouts, leaf_paths
from moejax.models import Decoder, family


def to_tensors(decoder: Decoder) -> dict[str, np.ndarray]:
    """The decoder's weights under their published keys, as views where the layout allows."""
    table = family(decoder.config.model_type).keys
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in leaf_paths(decoder):
        data = np.asarray(leaf)
        tensors |= layouts(table, path, data.shape)[-1].split(data)
    return tensors


def save_folder(decoder: Decoder, hugging_face: dict[str, Any], folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``; each appears under its name only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file(to_tensors(decoder), partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    dtype = str(np.asarray(decoder.embedding).dtype)
    (folder / "config.json").write_text(json.dumps(hugging_face | {"dtype": dtype}, indent=2) + "\n")
