"""``moejax analyse``: its table, its files, its plots, and one line where a person made a mistake."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest


def assert_one_line(outcome: tuple[int, str, str], *words: str) -> None:
    """It failed, and said why in one line that names every word."""
    code, out, err = outcome
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = [
        ("the cat sat on the mat", "cats"),
        ("a dog and the dog of a cat", "[red]dogs"),
        ("where is the mat", "cats"),
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in texts * 3), "utf-8")
    return path


def test_help(moejax_command: Callable) -> None:
    code, out, _ = moejax_command("analyse", "--help")
    assert code == 0
    for option in ("--data", "--against", "--out", "--drop-top", "--json"):
        assert option in out


def test_table_and_files(moejax_command: Callable, model_folder: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "analysis"
    options = ("--length", 32, "--out", folder, "--drop-top", 1, "--against", model_folder)
    code, out, err = moejax_command("analyse", model_folder, "--data", data, *options)
    assert (code, err) == (0, "")
    for word in ("nats a token", "[red]dogs", "feed-forward experts: router", "set overlap", "the next best"):
        assert word in out
    found = json.loads((folder / "statistics.json").read_text("utf-8"))
    assert found["labels"] == ["cats", "[red]dogs"]
    assert [change["overlap"] for change in found["changes"]["feed_forward"]] == [1, 1]
    with (folder / "layers.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    layers = found["mixtures"]["feed_forward"]["layers"]
    assert [float(row["router_entropy"]) for row in rows] == [layer["router_entropy"] for layer in layers]
    assert {path.stem for path in folder.glob("*.png")} == {
        "utilisation", "router", "coactivation", "layer_overlap", "labels", "changes",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


@pytest.mark.slow
def test_json_is_what_the_library_finds(
    moejax_command: Callable, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    import moejax
    from moejax import study

    folder = tmp_path / "out"
    code, out, err = moejax_command(
        "analyse", model_folder, "--data", data, "--length", 32, "--out", folder, "--no-by-token", "--json"
    )
    assert (code, err) == (0, "")
    lm = moejax.load(str(model_folder))
    want = study.analyse(lm, study.Windows(study.Documents.read(data, lm), 32), by_token=False).to_dict()
    assert (
        json.loads(out) == json.loads((folder / "statistics.json").read_text("utf-8")) == json.loads(json.dumps(want))
    )


def test_mistakes_are_one_line(moejax_command: Callable, model_folder: Path, data: Path, tmp_path: Path) -> None:
    def run(*options):
        return moejax_command("analyse", model_folder, *options)

    assert_one_line(run("--data", tmp_path / "none.txt", "--out", tmp_path), "none.txt", "no such file")
    assert_one_line(run("--data", data, "--out", data / "below"), "cannot write")
    assert_one_line(run("--data", data, "--out", tmp_path, "--drop-top", 5), "at most 4")
    assert_one_line(run("--data", data, "--out", tmp_path, "--length", 1000), "1000 tokens")
    assert_one_line(run("--data", data, "--out", tmp_path, "--against", "tiny-olmoe"), "vocabularies")
