"""The options by which every subcommand loads its model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from moejax.cli.options import Loading, parse_size

PROMPT = "the cat sat on the"
OPTIONS = ("--dtype", "--keep-packed", "--experts", "--max-bytes")


@pytest.mark.fast
@pytest.mark.parametrize("command", ["explain", "generate", "analyse", "bench", "verify"])
def test_every_command_that_loads_a_model_has_them(command: str) -> None:
    from moejax.cli import app

    found = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert set(OPTIONS) <= {name for parameter in found for name in parameter.opts}


@pytest.mark.fast
def test_sizes() -> None:
    sizes = {"1500": 1500, "12GiB": 12 << 30, "800MB": 800_000_000, "1.5k": 1500, "2 TiB": 2 << 40, "auto": "auto"}
    assert {text: parse_size(text) for text in sizes} == sizes
    for wrong in ("", "much", "12 parsecs", "GiB", "1.2.3", "-4"):
        with pytest.raises(typer.BadParameter, match="is no size"):
            parse_size(wrong)


def test_they_reach_the_model(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = Loading(dtype="bfloat16", experts="int8").load(str(model_folder))
    assert lm.decoder.dtype.name == "bfloat16"
    assert lm.config.packed == "int8"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("experts held as int8; relative rms error of their weights: experts.")
    assert len(err.splitlines()) == 1


def test_a_bound_reaches_the_explanation(moejax_command: Callable, model_folder: Path) -> None:
    code, out, err = moejax_command("explain", PROMPT, "-m", model_folder, "--max-bytes", "1KiB", "--json")
    assert (code, out) == (1, "")
    assert "max_bytes=1024 is too little" in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--dtype", "int8"), "choose from bfloat16"),
        (("--experts", "int3"), "choose from int8"),
        (("--keep-packed",), "olmoe is not published with MXFP4 experts"),
        (("--max-bytes", "1k"), "--max-bytes=1000 is too little"),
    ],
)
def test_what_cannot_be(option: tuple[str, ...], message: str, moejax_command: Callable, model_folder: Path) -> None:
    code, out, err = moejax_command("generate", PROMPT, "-m", model_folder, *option)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_rounded_experts_are_written_on_request(
    moejax_command: Callable, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moejax.cli.checkpoints.use_host_only", lambda: None)
    refused = moejax_command("export", model_folder, tmp_path / "no", "--experts", "int8")
    assert refused.code == 1
    assert "--dequantise" in refused.err
    assert not (tmp_path / "no").exists()
    done = moejax_command("export", model_folder, tmp_path / "yes", "--experts", "int8", "--dequantise")
    assert done.code == 0
    assert (tmp_path / "yes" / "model.safetensors").exists()


def test_doctor_says_what_fits_a_gpu(moejax_command: Callable, model_folder: Path) -> None:
    code, out, err = moejax_command("doctor", model_folder, "--gpu", "t4", "--gpu", "h200", "--tokens", 9, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [entry["gpu"] for entry in report["fit"]] == ["t4", "h200"]
    assert all(entry["fits"] for entry in report["fit"][0]["work"])
    shown = moejax_command("doctor", model_folder, "--gpu", "t4").out
    assert "explain 512" in shown
    assert "int8" in shown
    assert moejax_command("doctor", "--gpu", "t4").code == 1


@pytest.mark.slow
def test_verify_shows_how_far_rounded_experts_are_from_the_original(moejax_command: Callable) -> None:
    code, out, _ = moejax_command("verify", "tiny-olmoe", "--experts", "int8", "--json", "--max-bytes", "100MB")
    report = json.loads(out)
    assert code == 0
    assert report["passed"] is None
    assert 1e-4 < report["relative_rms"] < 0.02
    assert set(report["quantisation"]) == {f"feed_forward.experts.{kind}" for kind in ("gate_up", "down")}
    assert "unknown" in moejax_command("verify", "tiny-olmoe", "--experts", "int8").out
