"""How much of a GPU JAX may use, and how much of it is free; on stand-ins for GPUs."""

import os
import warnings
from types import SimpleNamespace

import jax
import pytest

from moejax.ops import memory

pytestmark = pytest.mark.fast

NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """A function that says whether JAX has started, and on what; no variable is set, and no warning was given."""
    for name in (NEW, OLD):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the test sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(memory, "_warned", set())

    def say(backend: str | None) -> None:
        monkeypatch.setattr(memory, "_has_started", lambda: backend is not None)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)

    return say


class TestReserve:
    def test_before_the_start(self, started) -> None:
        started(None)
        memory.reserve_memory()
        assert os.environ[NEW] == "0.95"
        assert OLD not in os.environ

    @pytest.mark.parametrize("name", [NEW, OLD])
    def test_what_the_user_has_set_stays(self, started, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both together would be an error in jaxlib."""
        started(None)
        monkeypatch.setenv(name, "0.5")
        memory.reserve_memory()
        assert {n: os.environ.get(n) for n in (NEW, OLD)} == {NEW: None, OLD: None} | {name: "0.5"}

    def test_after_the_start_on_a_gpu_one_line_says_what_would_have_helped(self, started) -> None:
        started("gpu")
        with pytest.warns(UserWarning, match=f"set {NEW}=0.95 before Python starts") as caught:
            memory.reserve_memory()
        assert len(str(caught[0].message).splitlines()) == 1
        assert NEW not in os.environ
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            memory.reserve_memory()

    def test_after_the_start_on_a_cpu_there_is_nothing_to_say(self, started) -> None:
        started("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            memory.reserve_memory()
        assert NEW not in os.environ

    def test_the_start_is_seen(self) -> None:
        jax.devices()
        assert memory._has_started()


class TestFree:
    @staticmethod
    def device(limit: int | None, used: int = 0):
        stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}
        return SimpleNamespace(memory_stats=lambda: stats)

    def test_less_a_margin_in_steps(self) -> None:
        assert memory.free_bytes([self.device(3200, 1000)]) == 1900  # 0.9 of 2200, in steps of a 32nd of 3200
        assert memory.free_bytes([self.device(3200, 1010)]) == 1900

    def test_the_device_with_the_fewest_counts(self) -> None:
        assert memory.free_bytes([self.device(3200, 1000), self.device(3200, 3000)]) == 100

    def test_a_cpu_does_not_tell(self) -> None:
        assert memory.free_bytes([self.device(None)]) is None
        assert memory.free_bytes(jax.devices("cpu")) is None
