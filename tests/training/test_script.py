"""``scripts/train_tiny.py`` survives ``kill -9``: the run goes on and ends in the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import moejax

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY = 6, 2


def start(corpus: Path, out: Path, log: Path) -> subprocess.Popen:
    options = {
        "corpus": corpus, "out": out, "export": out / "export", "steps": STEPS, "save-every": SAVE_EVERY,
        "batch": 2, "length": 32, "compute-dtype": "float32",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "train_tiny.py")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=file, stderr=subprocess.STDOUT
        )


def rows(out: Path) -> list[dict]:
    """The metrics that a run has written so far."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finish(process: subprocess.Popen, log: Path) -> str:
    assert process.wait(timeout=300) == 0, log.read_text()
    return log.read_text()


def final_state(out: Path) -> list[np.ndarray]:
    """Every array of the last checkpoint: weights and optimiser in float32."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager((out / "checkpoints").absolute())
    assert manager.latest_step() == STEPS
    return [np.asarray(leaf) for leaf in manager.restore(STEPS, args=ocp.args.StandardRestore())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_run_ends_in_the_same_bits(corpus_folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(corpus_folder, whole, tmp_path / "whole.log"), tmp_path / "whole.log")

    process = start(corpus_folder, killed, tmp_path / "killed.log")
    while not rows(killed):
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(rows(killed)) < STEPS // SAVE_EVERY, "it was killed in mid-run"
    assert not (killed / "export").exists()

    said = finish(start(corpus_folder, killed, tmp_path / "again.log"), tmp_path / "again.log")
    assert "resumed from step" in said

    weights = [load_file(out / "export" / "model.safetensors") for out in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][k].tobytes() == weights[1][k].tobytes() for k in weights[0])
    for x, y in zip(final_state(whole), final_state(killed), strict=True):
        assert x.tobytes() == y.tobytes()
    losses = [{r["step"]: r["cross_entropy"] for r in rows(out)} for out in (whole, killed)]
    assert losses[0] == losses[1]

    lm = moejax.load(killed / "export")
    assert lm.tokenizer is not None
    assert len(lm.generate_ids([[5, 6, 7]], max_new_tokens=3)[0]) <= 3
