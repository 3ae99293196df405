"""Results that the tests of DLBacktrace's interface share."""

from typing import Any

import pytest

from dlbacktrace.engines import run


@pytest.fixture(scope="session")
def results() -> dict[str, Any]:
    """The plain run of OLMoE. Do not change it."""
    return run(return_scores=True, return_layerwise_output=True)
