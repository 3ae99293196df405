"""A torch model in memory as a source of tensors; this module never imports torch."""

import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moejax.checkpoints.safetensors import Entry
from moejax.errors import CheckpointError

_DTYPES = {
    "torch.float64": np.dtype(np.float64),
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
    "torch.uint8": np.dtype(np.uint8),
}


class TorchModel:
    """The state dict of a ``transformers`` model, as a ``TensorSource``.

    Raises:
        CheckpointError: a parameter has a dtype that is not a plain float or byte.
    """

    def __init__(self, model: Any) -> None:
        self._state = model.state_dict()
        odd = [f"{k}: {v.dtype}" for k, v in self._state.items() if str(v.dtype) not in _DTYPES]
        if odd:
            raise CheckpointError(f"the torch model has parameters of unsupported dtype: {', '.join(odd[:5])}.")
        self.entries: Mapping[str, Entry] = {
            k: Entry(tuple(v.shape), _DTYPES[str(v.dtype)]) for k, v in self._state.items()
        }

    def read(self, key: str) -> np.ndarray:
        """Copy a tensor to the host; bfloat16 is copied as bits, since torch cannot make a NumPy array of it."""
        tensor = self._state[key].detach().cpu().contiguous()
        dtype = self.entries[key].dtype
        if dtype.itemsize == 2:
            return tensor.view(sys.modules["torch"].int16).numpy().view(dtype)
        return tensor.numpy().copy()
