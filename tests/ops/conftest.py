"""A pretended GPU for the tests of kernels."""

from types import SimpleNamespace

import pytest

from moejax.ops import device as targets
from moejax.ops.experts.matmul import hopper, mxfp4_hopper


@pytest.fixture
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Make the kernels of experts believe that the device is a Hopper GPU."""
    device = SimpleNamespace(compute_capability="9.0", core_count=132, platform="gpu")
    for module in (hopper, mxfp4_hopper, targets):
        monkeypatch.setattr(module, "target", lambda *_: device)
    return device
