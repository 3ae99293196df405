"""``moejax train``: a layer of one's own from a file to a model that is analysed and explained."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.layers import LAYERS

OWN = Path(__file__).with_name("own_layer.py")
MODEL = {
    "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip
SENTENCES = ["the cat sat on the mat. ", "one and two are three. "]

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """A run of six steps on two kinds of sentences; the registry is as before when it is over."""
    lines = [json.dumps({"text": SENTENCES[i % 2] * 9, "label": str(i % 2)}) for i in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    settings = {
        "model": MODEL, "data": str(tmp_path / "texts.jsonl"), "heldout_share": 0.1, "steps": 6, "batch": 4,
        "length": 16, "warmup": 2, "learning_rate": 0.02, "log_every": 3, "save_every": 6, "compute_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with LAYERS.restored():
        yield tmp_path / "config.json"


@pytest.mark.slow
def test_own_layer_is_trained_analysed_and_explained(
    moejax_command: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    import moejax
    from moejax.study import Documents, Windows, analyse

    out = tmp_path / "run"
    said = moejax_command(
        "train", "--config", config, "--plugin", OWN, "--moe-name", "my_moe_model", "--out", out, "--json"
    )
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[1]["cross_entropy"] < rows[0]["cross_entropy"]
    assert np.isfinite(rows[1]["heldout"])
    assert len(rows[0]["expert_confidence"]) == 2, "one for each layer"
    assert all(0.5 <= value <= 1 for value in rows[0]["expert_confidence"])
    # what the mixtures add is the mean over layers of their own weighted losses
    losses = 0.01 * np.array(rows[1]["balance_loss"]) + 0.001 * np.array(rows[1]["router_z_loss"])
    np.testing.assert_allclose(rows[1]["auxiliary"], losses.mean(), rtol=1e-4)
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert written == rows

    lm = moejax.load(out / "model")
    layer = lm.decoder.layers[0].feed_forward
    assert type(layer).__name__ == "MyMoELayer"
    assert layer.sharpness != 1, "its own parameter learns, and is stored"
    relevance = moejax.explain(lm, "the cat sat on")
    assert abs(relevance.ledger.residual[0]) <= 1e-5 * max(1, abs(relevance.ledger.target[0]))
    assert relevance.experts.shape == (1, 2, relevance.tokens.shape[-1], 2)

    found = analyse(lm, Windows(Documents.of(SENTENCES, ["cats", "numbers"], lm), length=12, batch=2), drop=0)
    assert found.labels == ("cats", "numbers")
    assert found.loss is not None
    assert found.loss > 0
    assert len(found.mixtures["feed_forward"].layers) == 2
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--moe-name", "my_moe"], {}, "MoE layer 'my_moe' is unknown; choose from"),
        ([], {"moe_name": "smoe"}, "unknown fields moe_name"),
        ([], {"batch": 3, "accumulate": 2}, "batch=3 is no multiple of 2 micro-batches"),
        ([], {"mesh": {"expert": 64}}, "needs 64 devices, there are"),
        ([], {"mesh": {"experts": 2}}, "mesh axes experts are unknown"),
        ([], {"model": MODEL | {"moe": "smoe", "num_experts": 2, "num_experts_per_tok": 3}}, "num_selected=3 must lie"),
        ([], {"length": 2000}, "tokens are not enough for length=2000"),
        ([], {"length": 200}, "heldout_share=0.1 of"),
        ([], {"heldout_tokens": 16}, "heldout_tokens=16 are too few for length=16"),
        ([], {"data": "no/such/file.txt"}, "no such file"),
        (["--logger", "comet"], {}, "logger='comet' is unknown; choose from wandb"),
    ],
)
def test_what_may_go_wrong_is_said_in_a_line(
    moejax_command: Callable[..., Any],
    config: Path,
    tmp_path: Path,
    arguments: list[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    said = moejax_command("train", "--config", config, "--out", tmp_path / "run", *arguments)
    assert said.code == 1
    assert message in " ".join(said.err.split())
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_any_number_of_steps_and_twice_in_a_row(
    moejax_command: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    # as an earlier version left it where the data had a typo: a run without a saved state blocks nothing
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"data": "nofile.txt"}')
    run = ("train", "--config", config, "--out", tmp_path / "run", "--moe_name", "smoe", "--log_every", 3)
    said = moejax_command(*run, "--steps", 5, "--save-every", 2, "--json")
    assert said.code == 0, said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["step"] for row in rows] == [3, 5]
    assert all("heldout" in row for row in rows), "each is the first at or after a multiple of two"

    again = moejax_command(*run, "--steps", 5)
    assert again.code == 0
    assert again.err == "already done: 5 steps; --steps of more goes on.\n"
    assert again.out == f"the trained model: {tmp_path / 'run' / 'model'}\n"

    changed = moejax_command(*run, "--steps", 5, "--data", tmp_path / "config.json")
    assert changed.code == 1
    assert "holds a run with another data" in changed.err


def test_a_run_that_is_stopped_is_saved_and_goes_on(
    moejax_command: Callable[..., Any], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moejax.training import Run
    from moejax.training.logs import MetricsLog

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    run = ("train", "--config", config, "--out", tmp_path / "run", "--log-every", 2)
    write = MetricsLog.write

    def press(self: MetricsLog, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", press)
        said = moejax_command(*run)
    assert said.code == 130
    assert said.err == "stopped at step 2, saved; run the same command to go on\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "model").exists()
    assert "resumed from step 2" in moejax_command(*run).out
    assert (tmp_path / "run" / "model").exists()

    # a second Ctrl-C does not wait
    def press_again(_: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "__iter__", press_again)
    said = moejax_command(*run, "--steps", 9)
    assert said.code == 130
    assert said.err == "stopped; step 6 is saved; run the same command to go on\n"
