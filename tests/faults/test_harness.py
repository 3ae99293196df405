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


def attack(name: str, command: str, count: int, seed: int, tmp_path: Path) -> dict[str, int]:
    """Run the harness; return its counts."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    arguments = [sys.executable, str(HARNESS), name, command, str(count), str(seed), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(name, command, done.stdout, done.stderr[-6000:])
    return json.loads(done.stdout.splitlines()[-1])


def check(counts: dict[str, int]) -> None:
    bad = ("traceback", "false success", "folder without success", "lost", "left behind", "not one line", "half a line")
    assert not {name: counts[name] for name in bad if counts.get(name)}


@pytest.mark.parametrize("command", ["convert", "train"])
def test_two_at_once(command: str, tmp_path: Path) -> None:
    check(attack("pairs", command, 2, 1, tmp_path))


@pytest.mark.parametrize("command", ["convert", "train"])
def test_kills(command: str, tmp_path: Path) -> None:
    check(attack("kills", command, 2, 2, tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_disks_that_fill_up(command: str, tmp_path: Path) -> None:
    check(attack("disks", command, 3, 3, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "count"), [("pairs", 50), ("kills", 50), ("disks", 100)])
def test_many(name: str, count: int, command: str, tmp_path: Path) -> None:
    check(attack(name, command, count, 4, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("command", COMMANDS)
def test_small_disks(command: str, tmp_path: Path) -> None:
    check(attack("tmpfs", command, 30, 5, tmp_path))
