"""Over two processes of one host everything works, or is refused in a line by both; nobody writes, nothing hangs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("in_two_processes.py")
WORKS = {f"expert {what}: ok" for what in ("logits", "explain_batch", "generate_ids", "ablate")} | {"data logits: ok"}
REFUSED = {f"data {what}: refused" for what in ("explain_batch", "generate_ids", "ablate")}
REFUSED |= {f"{what}: refused" for what in ("convert", "export", "train")}


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), port, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=500)[0].splitlines() for process in both]
    finally:
        for process in both:
            process.kill()
    for lines in said:
        assert {line for line in lines if not line.startswith("[Gloo]")} == WORKS | REFUSED
    assert not list(tmp_path.iterdir()), "nobody has written anything"
