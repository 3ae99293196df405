"""Settings and fixtures of all tests: shapes checked at run time, JAX on the CPU, no network, tiny models.

``tests/README.md`` says where what stands.
"""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# compiling takes most of the time, and optimising tiny programs gains nothing; this halves the time
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# the command keeps compiled programs in the home folder otherwise
os.environ["MOEJAX_COMPILATION_CACHE"] = "off"

import jax
import jaxtyping
import numpy as np
import pytest
from programs import forget_if_many

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("moejax") is None:
    sys.path.insert(0, str(ROOT))
assert "moejax" not in sys.modules, "moejax was imported before its shapes could be checked"
jaxtyping.install_import_hook("moejax", "shape_checking.check")


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark of files that may be run after every change."""
    config.addinivalue_line("markers", "fast: takes seconds and needs no torch; run with `pytest -m fast`")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how long each room took, where ``--durations`` asks for times."""
    if config.option.durations is None:
        return
    rooms: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = Path(report.nodeid.split("::")[0]).parent
                rooms["/".join(folder.parts[-2:])] += report.duration
    terminalreporter.section("seconds of each room")
    for room, seconds in rooms.most_common():
        terminalreporter.write_line(f"{seconds:8.1f}  {room}")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Free compiled programs after every file."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_programs_of_long_files() -> Iterator[None]:
    """Free compiled programs within a file that compiles very many."""
    yield
    forget_if_many()


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


# the factory imports moejax, which no test needs that only reads text: it is imported where it is used


@pytest.fixture(scope="session")
def make_olmoe() -> Callable[..., Any]:
    """A function of config options that returns a tiny torch OLMoE in float32, random and far from its init.

    Models are shared between tests: do not change them.
    """
    from tiny.hugging_face import olmoe

    return olmoe


@pytest.fixture(scope="session")
def toy_torch(make_olmoe: Callable[..., Any]) -> Any:
    """The torch OLMoE of default options."""
    return make_olmoe()


@pytest.fixture(scope="session")
def toy_lm(toy_torch: Any) -> Any:
    """The model of ``toy_torch``, loaded."""
    import moejax

    return moejax.load(toy_torch)


@pytest.fixture(scope="session")
def toy_config() -> dict[str, Any]:
    """The Hugging Face config of ``toy_torch``."""
    from tiny.hugging_face import TOY

    return {"model_type": "olmoe", **TOY}


@pytest.fixture(scope="session")
def toy_tokens() -> np.ndarray:
    """Token ids ``[B T]`` for ``toy_torch``; no special token is among them."""
    from tiny.hugging_face import TOY

    return np.random.default_rng(0).integers(2, TOY["vocab_size"], (3, 7))


@pytest.fixture(scope="session")
def torch_logits() -> Callable[..., np.ndarray]:
    """A function (torch model, tokens, valid) that returns the logits of ``transformers``."""
    from tiny import hugging_face

    return partial(hugging_face.torch_logits, positions=True)
