from collections.abc import Iterator
from types import SimpleNamespace

import jax
import pytest

from moejax.ops import device as targets
from moejax.ops.experts import hopper, hopper_packed


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As if there were one, for the kernels of experts."""
    device = SimpleNamespace(compute_capability="9.0", core_count=132, platform="gpu")
    for module in (hopper, hopper_packed, targets):
        monkeypatch.setattr(module, "target", lambda *_: device)
    return device
