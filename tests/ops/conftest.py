from collections.abc import Iterator
from types import SimpleNamespace

import jax
import pytest

from moejax.ops import device as targets
from moejax.ops.experts.matmul import hopper, mxfp4_hopper


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended Hopper GPU, for which the kernels of experts are traced."""
    device = SimpleNamespace(compute_capability="9.0", core_count=132, platform="gpu")
    for module in (hopper, mxfp4_hopper, targets):
        monkeypatch.setattr(module, "target", lambda *_: device)
    return device
