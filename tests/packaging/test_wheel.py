"""The wheel holds what the package reads at run time, and works where nothing of the clone is."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the build backend of this environment: no network is needed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path.relative_to(ROOT) for path in (ROOT / "moejax").rglob("*") if path.is_file()]
    needed = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert needed >= {"moejax/py.typed", "moejax/report/page/page.html", "moejax/bundled/tiny-olmoe/model.safetensors"}
    assert not needed - names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "scripts/"))]


def test_the_installed_wheel_runs_the_first_command_of_the_readme(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", wheel)
    where = run([str(python), "-c", "import moejax; print(moejax.__file__)"], tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path / "venv"), f"not the wheel, but {where}"
    match = re.search(r'\.venv/bin/moejax (explain "[^"]+")', (ROOT / "README.md").read_text())
    assert match is not None
    command = match[1].split(" ", 1)
    out = run([str(python.with_name("moejax")), command[0], command[1].strip('"')], tmp_path)
    assert "LORD" in out


def environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a new environment with the wheel, which borrows all other packages from this one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    (site,) = folder.glob("lib/python*/site-packages")
    # read after the environment's own packages, so that a moejax among the borrowed ones is not seen
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list[str], folder: Path) -> str:
    """What a command prints, run where the clone is not on the path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
