"""Two writers at once, kills and full disks: no false success, nothing lost, one line for each error.

The default set tries a few; ``pytest -m slow`` tries as many as the page on limits tells.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness.py")
COMMANDS = ("convert", "export", "train")
BAD = ("traceback", "false success", "folder without success", "lost", "left behind", "not one line", "half a line")


FEW = {"pairs": 2, "kills": 1, "disks": 2}


def attack(command: str, seed: int, tmp_path: Path, **counts: int) -> None:
    """Run the harness, and check that nothing bad happened."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    wanted = [f"{name}={count}" for name, count in counts.items()]
    program = [sys.executable, str(HARNESS), command, str(seed), str(tmp_path), *wanted]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(command, counts, done.stdout, done.stderr[-6000:])
    found = json.loads(done.stdout.splitlines()[-1])
    assert not {name: found[name] for name in BAD if found.get(name)}


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] if name == "train" else []) for name in COMMANDS]
)
def test_a_few(command: str, tmp_path: Path) -> None:
    attack(command, 1, tmp_path, **FEW)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("counts", [{"pairs": 50}, {"kills": 50}, {"disks": 100}], ids=str)
def test_many(command: str, counts: dict[str, int], tmp_path: Path) -> None:
    attack(command, 4, tmp_path, **counts)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("command", COMMANDS)
def test_small_disks(command: str, tmp_path: Path) -> None:
    attack(command, 5, tmp_path, tmpfs=30)
