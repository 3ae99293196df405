"""Which work fits which GPU, from configs alone."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moejax import CheckpointError, MoejaxError
from moejax.checkpoints import hub
from moejax.checkpoints.load import pack
from moejax.checkpoints.memory import estimate
from moejax.models import Config
from moejax.ops.device import assumed_gpu, compute_capability, target
from moejax.relevance.budget import Footprint
from moejax.report.fit import FitEntry, FitReport
from moejax.study.bench.shapes import SHAPES, published
from moejax.study.fit import GPU, GPUS, Work, fit, here, options_here

GIB = 2**30


def shallow(name: str, layers: int) -> Config:
    """A published shape with fewer layers, which takes less time."""
    from moejax.models import family

    return family(SHAPES[name]["model_type"]).config(SHAPES[name] | {"num_hidden_layers": layers})


def entries(report: FitReport, work: str) -> dict[str, FitEntry]:
    """The entries of a kind of work, by the format of the experts."""
    return {entry["experts"]: entry for entry in report["work"] if entry["work"].startswith(work)}


def test_olmoe_explains_within_16_gb() -> None:
    report = fit(published("olmoe-1b-7b"), "t4")
    assert report["usable"] < 15 * GIB
    explained = entries(report, "explain")
    assert explained["int8"]["fits"]
    assert explained["int8"]["chunk"] == 16
    assert explained["int8"]["rematerialised_layers"] == 0
    assert explained["int8"]["weights"] < 7 * GIB < 12 * GIB < explained[""]["weights"]
    assert explained["int8"]["options"] == "--dtype bfloat16 --experts int8"
    assert not entries(report, "train")[""]["fits"]
    assert report["emulates_bfloat16"]


@pytest.mark.slow
def test_qwen3_30b_explains_within_48_gb() -> None:
    report = fit(published("qwen3-30b-a3b"), "l40s")
    for work in ("load", "explain", "generate"):
        found = entries(report, work)
        assert (found[""]["fits"], found["int8"]["fits"]) == (False, True), work
    assert fit(published("qwen3-30b-a3b"), "a100-80")["work"][0]["fits"]


@pytest.mark.slow
def test_gpt_oss_fits_as_it_is_published() -> None:
    report = fit(published("gpt-oss-20b"), "l4")
    explained = entries(report, "explain")
    assert list(explained) == ["", "mxfp4", "int8"]
    assert [explained[way]["fits"] for way in explained] == [False, True, False]
    assert explained["mxfp4"]["options"] == "--dtype bfloat16 --keep-packed"


def test_estimates_are_those_that_programs_go_by() -> None:
    config = shallow("olmoe-1b-7b", 2)
    found = entries(fit(config, "h200", work=Work(100, 3, 7)), "explain")["int8"]
    held = pack(config, "int8")
    with assumed_gpu(GPUS["h200"].capability):
        footprint = Footprint.of(held, 1, 100, 2)
    weights = estimate(held, fit_dtype()).total
    assert found["weights"] == weights
    assert footprint.unpacked == 2 * 64 * 3 * 2048 * 1024
    assert found["bytes"] == pytest.approx(weights + footprint.bytes(3, footprint.arrange(3, 2**40)) / 0.9, rel=1e-6)


def fit_dtype():
    from moejax.checkpoints.convert import parse_dtype

    return parse_dtype("bfloat16")


def test_a_kernel_for_packed_experts_unpacks_nothing() -> None:
    config = shallow("gpt-oss-20b", 1).pack("mxfp4")
    with assumed_gpu("8.0"):
        assert compute_capability(target()) == 8
        with_kernel = Footprint.of(config, 1, 100, 2)
    with assumed_gpu("7.5"):
        without = Footprint.of(config, 1, 100, 2)
    assert with_kernel.unpacked == 0
    assert without.unpacked == 2 * 32 * 3 * 2880 * 2880
    assert compute_capability(target()) == 0


def test_a_config_file_suffices_and_a_gpu_must_be_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["olmoe-1b-7b"] | {"num_hidden_layers": 1}))
    assert json.loads(json.dumps(fit(tmp_path, "l4")))["work"][0]["fits"]
    with pytest.raises(MoejaxError, match="GPU 'voodoo2' is not in the table; choose from t4"):
        fit(tmp_path, "voodoo2")


def test_gpus_after_ampere_have_units_for_bfloat16() -> None:
    emulating = {name for name, card in GPUS.items() if card.emulates_bfloat16}
    assert emulating == {"t4", "v100-16", "v100-32"}


# ------------------------------------------------------------------------------------------------ the device at hand


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What JAX is made to compute on: a T4 with all of its memory free."""
    stats = {"bytes_limit": GPUS["t4"].usable, "bytes_in_use": 0}
    found = SimpleNamespace(device_kind="Tesla T4", platform="gpu", compute_capability="7.5", stats=stats)
    found.memory_stats = lambda: found.stats
    monkeypatch.setattr("moejax.study.fit.target", lambda: found)
    return found


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    """A folder with the config of OLMoE-1B-7B."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["olmoe-1b-7b"]))
    return tmp_path


def test_a_model_is_loaded_exactly_where_it_fits(device: SimpleNamespace, olmoe: Path) -> None:
    assert options_here(olmoe, "load") == {"dtype": "bfloat16"}
    assert options_here(olmoe, "explain") == {"dtype": "bfloat16", "experts": "int8"}, "room for all targets at a time"
    assert options_here(olmoe, "explain", size=Work(64, 1)) == {"dtype": "bfloat16"}
    device.stats = {"bytes_limit": GPUS["a100-40"].usable, "bytes_in_use": GIB}
    device.compute_capability = "8.0"
    assert here() == GPU("Tesla T4", GPUS["a100-40"].usable >> 20, "8.0", GPUS["a100-40"].usable - GIB)
    assert options_here(olmoe, "explain") == {"dtype": "bfloat16"}


def test_what_does_not_fit_is_said_in_numbers(device: SimpleNamespace, olmoe: Path) -> None:
    device.stats["bytes_in_use"] = 12 * GIB
    with pytest.raises(MoejaxError, match=r"to load .* takes 7\.\d GiB, and 2\.2 are free on Tesla T4"):
        options_here(olmoe, "load")
    with pytest.raises(MoejaxError, match="work 'paint' is unknown; choose from load, explain, generate"):
        options_here(olmoe, "paint")
    device.stats = {}
    with pytest.raises(MoejaxError, match="Tesla T4 does not say how much memory is free"):
        options_here(olmoe)


def test_a_cpu_has_the_memory_of_the_machine() -> None:
    assert options_here("tiny-olmoe") == {"dtype": "bfloat16"}
    assert here().usable > 0
    assert fit("tiny-olmoe", "here")["work"][0]["fits"]


def test_a_hub_that_does_not_answer_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda seconds: bool(time.sleep(0.5)) or True)
    assert hub.is_reachable(5.0)
    begin = time.monotonic()
    assert not hub.is_reachable(0.1)
    assert time.monotonic() - begin < 0.4
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="nobody/nothing is not on this machine, and the hub cannot be reached"):
        options_here("nobody/nothing")
