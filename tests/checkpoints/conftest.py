"""Folders as transformers writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.fixture(scope="session")
def published(toy_torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model as ``save_pretrained`` writes it, in one file. Do not change it."""
    folder = tmp_path_factory.mktemp("published")
    toy_torch.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded(toy_torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in shards with an index. Do not change it."""
    folder = tmp_path_factory.mktemp("sharded")
    toy_torch.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, np.ndarray]]:
    """A function that returns all tensors of a folder, read without moejax."""

    def read(folder: Path) -> dict[str, np.ndarray]:
        return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}

    return read
