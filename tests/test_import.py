"""Importing the package is light: no heavy neighbour is loaded, and it is quick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "matplotlib", "orbax", "transformers", "huggingface_hub", "pandas"]
PROMISED_SECONDS = 2.0
LOADED_MACHINE = 2.0


def run_fresh(code: str) -> str:
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["moejax", "moejax.cli"])
def test_heavy_packages_are_not_imported(module: str) -> None:
    out = run_fresh(f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert out.strip() == "[]"


def test_no_backend_is_started() -> None:
    """So that a model's load can still say how much of a GPU JAX may use."""
    seen = "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert run_fresh(f"import moejax, moejax.cli; {seen}").strip() == "False"


def test_import_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import moejax; print(time.perf_counter() - start)"
    seconds = min(float(run_fresh(code)) for _ in range(3))
    print(f"import moejax: {seconds:.2f} s")
    assert seconds < PROMISED_SECONDS * LOADED_MACHINE
