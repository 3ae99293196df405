"""Tests of this folder run on four emulated devices, in a process of their own.

JAX fixes the number of CPU devices when it starts, and all other tests need one device. So pytest collects,
parametrises and reports in its own process, but the test function is called in a spawned process, which lives for the
session. Arguments of a test (parameters, ``tmp_path``) are pickled, so a test takes no fixture that cannot be pickled.
"""

import importlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from programs import forget_if_many

DEVICES = 4


def _emulate_devices() -> None:
    """Prepare the spawned process."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def _call(module: str, function: str, arguments: dict[str, Any]) -> None:
    """Call a test function in the spawned process."""
    try:
        getattr(importlib.import_module(module), function)(**arguments)
    finally:
        forget_if_many()


@pytest.fixture(scope="session", autouse=True)
def four_devices() -> Iterator[ProcessPoolExecutor]:
    """The spawned process."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_emulate_devices) as pool:
        yield pool


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Hand a test of this folder to the spawned process."""
    pool: ProcessPoolExecutor = pyfuncitem.funcargs["four_devices"]
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    pool.submit(_call, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments).result()
    return True
