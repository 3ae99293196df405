"""The commands print what they should, and errors that a user can mend have one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny.hugging_face import FAMILIES
from typer.testing import CliRunner

import moejax
from moejax import cli
from moejax.checkpoints.memory import estimate
from moejax.checkpoints.verify import verify

from .files import OLMOE, olmoe_shapes, random_tensors, write_model

_ROOT = Path(__file__).parents[2]
_RUN = CliRunner()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", random_tensors(olmoe_shapes(OLMOE)))


def _moejax(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "moejax", *arguments], cwd=_ROOT, capture_output=True, text=True)


def test_convert_export_and_script(source: Path, tmp_path: Path) -> None:
    script = [
        sys.executable,
        "scripts/convert_checkpoint.py",
        str(source),
        str(tmp_path / "orbax"),
        "--dtype",
        "float32",
    ]
    environment = {"PYTHONPATH": str(_ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(script, cwd=_ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "bytes in" in done.stdout
    assert "peak host memory" in done.stdout
    assert done.stderr == "", "no bar where nobody looks, and no notes of other libraries"
    done = _moejax("export", str(tmp_path / "orbax"), str(tmp_path / "again"), "--max-shard-bytes", "30000", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["destination"] == str(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 2


def test_no_bar_where_nobody_looks(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moejax.export(source, tmp_path / "again")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("case", ["existing", "nothing", "dtype", "names"])
def test_errors_are_one_line(source: Path, tmp_path: Path, case: str) -> None:
    destination = tmp_path / "out"
    arguments = ["convert", str(source), str(destination)]
    if case == "existing":
        destination.mkdir()
    if case == "nothing":
        (source / "config.json").unlink()
    if case == "dtype":
        arguments += ["--dtype", "int4"]
    if case == "names":
        tensors = random_tensors(olmoe_shapes(OLMOE))
        tensors["two\nlines \x1b[31m and a ghost"] = tensors.pop("model.norm.weight")
        write_model(source, tensors)
    done = _moejax(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("moejax: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_verify_command(source: Path) -> None:
    result = _RUN.invoke(cli.app, ["verify", str(source), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["passed"] is True
    assert report["relative_rms"] < 1e-5
    assert report["argmax_agreement"] == 1.0
    assert report["routing_agreement"] == [1.0] * 3
    result = _RUN.invoke(cli.app, ["verify", str(source)])
    assert result.stderr == "", "no bars of transformers"
    assert "the same" in result.stdout
    assert "relative rms" in result.stdout


def test_verify_finds_a_difference(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["moejax.checkpoints.verify"]
    honest = module._run_moejax

    def wrong(decoder, tokens):
        logits, routed = honest(decoder, tokens)
        return logits * 1.0001, routed

    monkeypatch.setattr(module, "_run_moejax", wrong)
    report = verify(source)
    assert report.passed is False
    assert 0.5e-4 < report.relative_rms < 2e-4
    result = _RUN.invoke(cli.app, ["verify", str(source)])
    assert result.exit_code == 1
    assert "not the same" in result.stdout


def test_verify_reports_weights_that_are_not_finite(tmp_path: Path) -> None:
    tensors = random_tensors(olmoe_shapes(OLMOE))
    tensors["model.layers.2.self_attn.q_norm.weight"][3] = np.nan
    report = verify(write_model(tmp_path / "source", tensors))
    assert report.passed is False
    assert report.nonfinite == {"layers.2.attention.query_norm.weight": 1}


def test_verify_in_a_coarse_dtype_gives_no_verdict(source: Path) -> None:
    report = verify(source, dtype="bfloat16")
    assert report.passed is None
    assert 1e-5 < report.relative_rms < 0.2


def test_verify_without_torch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(moejax.MoejaxError, match="pip install torch"):
        verify(source)


def test_doctor(source: Path) -> None:
    report = json.loads(_RUN.invoke(cli.app, ["doctor", str(source), "--json"]).stdout)
    assert report["versions"]["jax"]
    assert report["versions"]["moejax"] == moejax.__version__
    assert report["devices"][0]["bytes"] > 0
    assert report["config"]["num_experts"] == 6
    wide, narrow, int8 = report["memory"]
    assert (wide["dtype"], narrow["dtype"]) == ("float32", "bfloat16")
    shapes = olmoe_shapes(OLMOE)
    assert wide["total"] == 2 * narrow["total"] == 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    layer = sum(int(np.prod(shape)) for key, shape in shapes.items() if key.startswith("model.layers.1."))
    experts = sum(int(np.prod(shape)) for key, shape in shapes.items() if key.startswith("model.layers.1.mlp.experts."))
    assert narrow["largest_moe_layer"] == 2 * layer
    assert narrow["layers"][1] == {
        "layer": 1,
        "experts": 2 * experts,
        "active": 2 * experts // 3,
        "rest": 2 * (layer - experts),
    }
    # a byte a value, and a float32 scale for each row
    assert narrow["total"] / 2 < int8["total"] < narrow["total"]
    assert int8["layers"][1]["rest"] == narrow["layers"][1]["rest"]
    assert narrow["cache_per_token"] == 3 * 2 * 2 * 6 * 2  # layers, keys and values, heads, their width, bytes
    shown = _RUN.invoke(cli.app, ["doctor", str(source)]).stdout
    assert "largest MoE layer" in shown
    assert "of the device's memory" in shown
    assert "model" not in json.loads(_RUN.invoke(cli.app, ["doctor", "--json"]).stdout)


def test_a_model_is_measured_without_its_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()
    assert _RUN.invoke(cli.app, ["doctor", str(source)]).exit_code == 0


def test_model_config() -> None:
    from . import tiny

    model = tiny.make("qwen3_moe")
    for given in (model, moejax.load(model), moejax.load(model).decoder):
        config = moejax.get_model_config(given)
        assert (config.hidden_size, config.num_hidden_layers) == (40, 3)
        assert (config.num_experts, config.num_experts_per_tok) == (7, 3)
    assert moejax.get_model_config("tiny-olmoe").num_experts == 16
    with pytest.raises(moejax.ConfigError, match="has no config"):
        moejax.get_model_config(7)


def test_supported_models() -> None:
    assert set(moejax.list_supported_models()) == {*FAMILIES, "moejax"}


def test_published_sizes() -> None:
    """OLMoE-1B-7B has 6.92e9 parameters; a token uses 1.28e9 of them."""
    from moejax.models import family

    size = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8}
    memory = estimate(family("olmoe").config(OLMOE | size | heads), np.dtype(np.float16))
    assert memory.total // 2 == 6_919_161_856
    unused = sum(layer.experts - layer.active for layer in memory.layers)
    assert (memory.total - unused) // 2 == pytest.approx(1.28e9, rel=0.01)


def test_memory_of_a_registered_layer() -> None:
    """The experts of a registered layer count as experts: a token uses 2 of 8."""
    from moejax.models import family

    size = {"vocab_size": 88, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "num_experts": 8, "num_experts_per_tok": 2}
    config = family("moejax").config({"moe": "smoe_plus_plus"} | size | heads)
    (layer, _) = estimate(config, np.dtype(np.float32)).layers
    assert layer.experts == 8 * 3 * 20 * 48 * 4
    assert layer.active == layer.experts // 4
