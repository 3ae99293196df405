"""Metrics go to Weights & Biases if a run is told so; a stand-in for its package records what it is told."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moejax import ConfigError
from moejax.training import Run, TrainConfig
from moejax.training.logs import MetricsLog

MODEL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "moe": "smoe",
}  # fmt: skip


class StandIn(ModuleType):
    """Records the calls of ``wandb.init``, ``run.log`` and ``run.finish``."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.exits: list[int] = []

    def init(self, **options: Any) -> "StandIn":
        self.inits.append(options)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.rows.append((step, numbers))

    def finish(self, exit_code: int) -> None:
        self.exits.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_rows_are_sent_and_a_resumed_run_goes_on_in_the_same_one(wandb: StandIn, tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, "wandb", {"steps": 4}) as log:
        log.write({"step": 2, "cross_entropy": 1.5, "balance_loss": [1.0, 2.0]})
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path, 2, "wandb", {"steps": 4}):
        raise KeyboardInterrupt
    assert wandb.rows == [(2, {"cross_entropy": 1.5, "balance_loss/0": 1.0, "balance_loss/1": 2.0})]
    assert wandb.exits == [0, 1]
    first, second = wandb.inits
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("moejax", tmp_path.name, "allow")
    assert first["config"] == {"steps": 4}
    assert first["dir"] == str(tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_whole_run(wandb: StandIn, corpus_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        MODEL, str(corpus_folder / "train.npz"), heldout=str(corpus_folder / "heldout.npz"), steps=2, batch=2, length=9,
        log_every=1, save_every=2, warmup=1, compute_dtype="float32", logger="wandb",
    )  # fmt: skip
    rows = list(Run(config, tmp_path / "run"))
    assert [step for step, _ in wandb.rows] == [row["step"] for row in rows] == [1, 2]
    assert wandb.rows[1][1]["heldout"] == rows[1]["heldout"]
    assert wandb.inits[0]["config"]["model"] == MODEL
    assert json.loads((tmp_path / "run" / "config.json").read_text())["logger"] == "wandb"
    # the run is the same one without
    assert list(Run(replace(config, logger=None), tmp_path / "run")) == []


def test_what_is_not_there_is_said_before_anything_is_written(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(MODEL, str(corpus_folder / "train.npz"), length=9, logger="wandb")
    for absent in (None, ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", absent)
        with pytest.raises(ConfigError, match=r"logger='wandb' needs the package wandb.*: pip install wandb"):
            next(iter(Run(config, tmp_path / "run")))
    with pytest.raises(ConfigError, match="logger='comet' is unknown; choose from wandb"):
        Run(replace(config, logger="comet"), tmp_path / "run").check()
    assert not (tmp_path / "run").exists()
