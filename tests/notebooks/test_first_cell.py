"""The first cell of every notebook: what it installs, what it says, and that it runs before moejax is there.

The cell is taken from a notebook as it is stored, and runs with other answers of pip, nvidia-smi and JAX.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import nbformat
import numpy as np
import pytest

pytestmark = pytest.mark.fast

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
HEAD = "| NVIDIA-SMI 550.54.15      Driver Version: 550.54.15      CUDA Version: 12.4     |"
NEW_HEAD = "| NVIDIA-SMI 580.82.07      Driver Version: 580.82.07      CUDA Version: 13.0     |"
NEWER_HEAD = "| NVIDIA-SMI 610.10   KMD Version: 610.10   CUDA UMD Version: 14.1 |"
OLD_HEAD = "| NVIDIA-SMI 470.82.01    Driver Version: 470.82.01    CUDA Version: 11.4     |"
NONE = "/bin/sh: 1: nvidia-smi: not found"
JAX = jax.__version__


def first_cell(path: Path) -> str:
    """The source of the first cell with code."""
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def functions() -> dict[str, Any]:
    """The names that the cell defines before it does anything."""
    space: dict[str, Any] = {}
    exec(first_cell(NOTEBOOKS[0]).split("\nextra = cuda_extra")[0], space)
    return space


def test_all_notebooks_begin_with_the_same_cell() -> None:
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize(
    ("printed", "extra"), [(HEAD, "cuda12"), (NEW_HEAD, "cuda13"), (NEWER_HEAD, "cuda13"), (OLD_HEAD, ""), (NONE, "")]
)
def test_the_extra_follows_the_driver(printed: str, extra: str) -> None:
    assert functions()["cuda_extra"](printed) == extra


@pytest.mark.parametrize(
    ("source", "extra", "wanted"),
    [
        ("moejax", "", "moejax"),
        ("moejax", "cuda13", "moejax[cuda13]"),
        ("..", "", ".."),
        ("..", "cuda12", "..[cuda12]"),
        ("git+https://example.org/moejax", "", "moejax @ git+https://example.org/moejax"),
        ("git+https://example.org/moejax", "cuda12", "moejax[cuda12] @ git+https://example.org/moejax"),
    ],
)
def test_the_requirement_is_one_that_pip_reads(source: str, extra: str, wanted: str) -> None:
    assert functions()["requirement"](source, extra) == wanted


def test_the_clone_that_holds_the_notebook_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    assert functions()["SOURCE"] == ".."
    monkeypatch.chdir(tmp_path)
    assert functions()["SOURCE"] == "moejax"


# ------------------------------------------------------------------------------------------------ the cell as a whole


@dataclass
class Machine:
    """A machine as the cell sees it.

    Attributes:
        packages: versions of what is installed.
        printed: what nvidia-smi prints.
        index: what pip installs with a requirement: versions by name.
        commands: the calls of pip.
    """

    packages: dict[str, str]
    printed: str = NONE
    index: dict[str, dict[str, str]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def pip(self, command: list[str], **_: Any) -> SimpleNamespace:
        """What ``subprocess.run`` does here."""
        assert command[:3] == [sys.executable, "-m", "pip"]
        self.commands.append(" ".join(command[3:]))
        if command[3] == "uninstall":
            for name in command[6:]:
                del self.packages[name]
        elif command[-1] in self.index:
            self.packages |= self.index[command[-1]]
        else:
            return SimpleNamespace(returncode=1, stderr=f"No matching distribution found for {command[-1]}")
        return SimpleNamespace(returncode=0, stderr="")

    def distributions(self, folder: Path) -> list[metadata.Distribution]:
        """What is installed, read from disk as importlib does; names of folders and files have underscores."""
        for name, version in self.packages.items():
            made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            made.mkdir(exist_ok=True)
            written = name.replace("-", "_") if "cuda" in name else name
            (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {written}\nVersion: {version}\n")
        kept = {f"{name.replace('-', '_')}-{version}.dist-info" for name, version in self.packages.items()}
        return [metadata.PathDistribution(path) for path in folder.glob("*.dist-info") if path.name in kept]


def plugin(cuda: int, version: str) -> dict[str, str]:
    return {f"jax-cuda{cuda}-plugin": version, f"jax-cuda{cuda}-pjrt": version}


HAVE = {"jax": JAX, "jaxlib": JAX, "numpy": np.__version__, "moejax": metadata.version("moejax")}
"""What is installed where these tests run."""

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the cell on a machine, on Colab or elsewhere, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")

    def run_cell(machine: Machine, colab: bool = False, found: bool = True, backend: str = "cpu") -> str:
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "distributions", lambda **_: machine.distributions(tmp_path))
            patch.setattr(subprocess, "run", machine.pip)
            patch.setattr(subprocess, "getoutput", lambda command: machine.printed)
            patch.setattr("importlib.util.find_spec", lambda name: object() if found else None)
            patch.setattr(jax, "default_backend", lambda: backend)
            if colab:
                patch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
            exec(first_cell(NOTEBOOKS[0]), {})
        return capsys.readouterr().out

    return run_cell


def test_nothing_is_installed_where_moejax_is_found(run: Run) -> None:
    machine = Machine(HAVE | plugin(12, "0.4.0"), HEAD)
    said = run(machine)
    assert machine.commands == []
    assert said.splitlines() == [
        str(jax.devices()),
        "JAX does not use the GPU: pip install 'moejax[cuda12]', restart, run again from here",
    ]
    assert run(Machine(dict(HAVE))).endswith("go on: JAX computes on the cpu; the last part wants a GPU\n")
    assert run(Machine(HAVE | plugin(12, JAX), HEAD), backend="gpu").endswith("go on: JAX computes on the gpu\n")


def test_outside_of_colab_what_is_missing_is_installed(run: Run) -> None:
    old = {name: version for name, version in HAVE.items() if name != "moejax"}
    machine = Machine(old, index={"moejax": HAVE})
    run(machine, found=False)
    assert machine.commands == ["install -q moejax"]


def test_colab_with_a_gpu_gets_the_plugin_of_its_driver(run: Run) -> None:
    bare = {"numpy": HAVE["numpy"], "jax": "0.7.2", "jaxlib": "0.7.2"} | plugin(12, "0.7.2")
    machine = Machine(dict(bare), HEAD, {"moejax[cuda12]": HAVE | plugin(12, JAX)})
    assert run(machine, colab=True, backend="gpu").endswith("go on: JAX computes on the gpu\n")
    assert machine.commands == ["install -q moejax[cuda12]"]
    assert run(machine, colab=True, backend="gpu").startswith("[")
    assert len(machine.commands) == 1, "a second run installs nothing"


def test_a_plugin_for_another_cuda_is_removed(run: Run) -> None:
    bare = {"numpy": HAVE["numpy"], "jax": "0.7.2", "jaxlib": "0.7.2"} | plugin(12, "0.7.2")
    machine = Machine(bare, NEW_HEAD, {"moejax[cuda13]": HAVE | plugin(13, JAX)})
    run(machine, colab=True, backend="gpu")
    assert machine.commands == ["install -q moejax[cuda13]", "uninstall -q -y jax-cuda12-plugin jax-cuda12-pjrt"]
    assert machine.packages == HAVE | plugin(13, JAX)


def test_a_plugin_that_stayed_behind_is_replaced(run: Run) -> None:
    fresh = {f"jax[cuda12]=={JAX}": plugin(12, JAX)}
    machine = Machine(HAVE | plugin(12, JAX) | {"jax-cuda12-pjrt": "0.7.2"}, HEAD, fresh)
    run(machine, colab=True, backend="gpu")
    assert machine.commands == ["uninstall -q -y jax-cuda12-pjrt", f"install -q jax[cuda12]=={JAX}"]
    absent = Machine(dict(HAVE), HEAD, fresh)
    run(absent, colab=True, backend="gpu")
    assert absent.commands == [f"install -q jax[cuda12]=={JAX}"]
    assert absent.packages == machine.packages == HAVE | plugin(12, JAX)


def test_colab_without_a_gpu_only_loses_a_plugin_that_does_not_fit(run: Run) -> None:
    bare = {"numpy": HAVE["numpy"], "jax": "0.7.2", "jaxlib": "0.7.2"} | plugin(12, "0.7.2")
    machine = Machine(bare, index={"moejax": dict(HAVE)})
    run(machine, colab=True)
    assert machine.commands == ["install -q moejax", "uninstall -q -y jax-cuda12-plugin jax-cuda12-pjrt"]
    fits = Machine(HAVE | plugin(12, JAX))
    run(fits, colab=True)
    assert fits.commands == []


def test_what_was_imported_before_it_changed_wants_a_restart(run: Run) -> None:
    newer = HAVE | {"jax": "99.1", "jaxlib": "99.1"}
    machine = Machine({"numpy": HAVE["numpy"], "jax": JAX, "jaxlib": JAX}, HEAD, {"moejax[cuda12]": newer})
    machine.index["jax[cuda12]==99.1"] = plugin(12, "99.1")
    last = "jax is another version now: restart the runtime, then run again from here"
    assert run(machine, colab=True).splitlines()[-1] == last
    assert run(machine, colab=True).splitlines() == [last], "also when the cell is run again without a restart"


def test_what_pip_says_is_shown_when_it_fails(run: Run) -> None:
    with pytest.raises(AssertionError, match="No matching distribution found for moejax"):
        run(Machine({"numpy": HAVE["numpy"]}), colab=True)


def test_jax_gets_most_of_the_memory_before_it_starts() -> None:
    """In a process of its own, where JAX has not started, without the package in reach by path."""
    code = first_cell(NOTEBOOKS[0]) + (
        "\nimport os\nassert os.environ['XLA_CLIENT_MEM_FRACTION'] == '0.95'\n"
        "assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' not in os.environ\n"
    )
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    root = str(NOTEBOOKS[0].parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"PYTHONPATH": root}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[CpuDevice(id=0)]")
