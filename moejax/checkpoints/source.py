"""Tell whether two runs read the same files."""

import hashlib
import json
from collections.abc import Mapping

from moejax.checkpoints.folder import ModelFolder
from moejax.checkpoints.safetensors import Entry


def describe_source(folder: ModelFolder, entries: Mapping[str, Entry]) -> str:
    """Return a digest of a model folder: config, shapes and dtypes, and the sizes and times of its files.

    Args:
        folder: the folder.
        entries: shape and dtype of its tensors or leaves.
    """
    about = {
        "config": dict(folder.hugging_face),
        "tensors": {key: [list(entry.shape), str(entry.dtype)] for key, entry in entries.items()},
        "files": folder.stamps.sizes_and_times(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
