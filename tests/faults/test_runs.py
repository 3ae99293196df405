"""Training runs: damaged states, files of the run, two runs in one folder."""

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moejax
from faults.tiny_run import settings_of
from moejax import writing
from moejax.errors import BusyError
from moejax.training import Run, logs

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, whose states of steps 4 and 6 are there."""
    work = tmp_path_factory.mktemp("runs")
    list(Run(settings_of(work), work / "whole"))
    assert sorted(path.name for path in (work / "whole" / "checkpoints").iterdir()) == ["4", "6"]
    return work


@pytest.fixture
def run(finished: Path) -> Any:
    """A copy of the run, and a function that goes on with it."""
    copy = finished / "copy"
    shutil.copytree(finished / "whole", copy)
    yield lambda **options: Run(settings_of(finished, **options.pop("changes", {})), copy, **options)
    shutil.rmtree(copy)


def _truncated(step: Path) -> None:
    big = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    big.write_bytes(big.read_bytes()[: big.stat().st_size // 2])


def _emptied(step: Path) -> None:
    for path in step.rglob("*"):
        if path.is_file() and path.name != "moejax.json":
            path.write_bytes(b"")


def _flipped(step: Path) -> None:
    draw = random.Random(9)
    path = draw.choice(sorted(p for p in (step / "default").rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _hollow(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _linked(step: Path) -> None:
    shutil.move(step / "default", step.parents[2] / "elsewhere")
    (step / "default").symlink_to(step.parents[2] / "elsewhere")


def _old_and_garbage(step: Path) -> None:
    (step / "moejax.json").unlink()
    for path in step.rglob("_METADATA"):
        path.write_text("{")


DAMAGES = [_flipped, _hollow, _old_and_garbage]
MORE = [pytest.param(damage, marks=pytest.mark.slow) for damage in (_truncated, _emptied, _linked)]


@pytest.mark.parametrize("damage", [*DAMAGES, *MORE])
def test_a_damaged_newest_state(run: Any, finished: Path, damage: Callable[[Path], None]) -> None:
    states = run().folder / "checkpoints"
    damage(states / "6")
    with pytest.raises(moejax.CheckpointError, match="state of step 6 cannot be read") as error:
        list(run(falls_back=False))
    assert "\n" not in str(error.value)
    again = run()
    with pytest.warns(
        UserWarning, match=r"state of step 6 is damaged .*kept as 6\.damaged, and the run goes on from step 4"
    ):
        list(again)
    assert again.started_from == 4
    assert {path.name for path in states.iterdir()} == {"4", "6", "6.damaged"}
    for name in ("model/model.safetensors", "model/config.json"):
        assert (again.folder / name).read_bytes() == (finished / "whole" / name).read_bytes()
    rows = [json.loads(line)["step"] for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(finished / "elsewhere", ignore_errors=True)


def test_no_state_is_whole(run: Any) -> None:
    for step in ("4", "6"):
        _truncated(run().folder / "checkpoints" / step)
    with pytest.raises(moejax.CheckpointError, match="no state before it is taken; remove it, or choose another"):
        list(run())
    assert (run().folder / "checkpoints" / "6").is_dir(), "nothing is set aside where nothing takes its place"


def test_states_without_a_manifest_are_read(run: Any) -> None:
    for path in (run().folder / "checkpoints").rglob("moejax.json"):
        path.unlink()
    again = run(changes={"steps": 7})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info")
        list(again)
    assert again.started_from == 6


def test_two_in_one_folder(run: Any) -> None:
    first, second = run(changes={"steps": 8}), run(changes={"steps": 8})
    rows = iter(first)
    next(rows)
    with pytest.raises(BusyError, match="another run"):
        next(iter(second))
    rows.close()
    assert not (first.folder / writing.LOCK).exists()


@pytest.mark.parametrize("text", ["", '{"steps":', "[]", "\0", '{"model_type": "olmoe"}'])
def test_config_that_is_none_of_a_run(run: Any, text: str) -> None:
    folder = run().folder
    (folder / "config.json").write_text(text)
    with pytest.raises(moejax.ConfigError, match=r"config\.json") as error:
        run()
    assert "\n" not in str(error.value)
    assert (folder / "config.json").read_text() == text


def test_a_folder_of_somebody_else(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 99}\n')
    with pytest.raises(moejax.ConfigError, match=r"holds metrics\.jsonl, but no config\.json of a run"):
        Run(settings_of(finished), tmp_path)


# ---- metrics


def _rows(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_mended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 1}\n{"step": 2, "x": 1}\n{"step": 4}\n{"st')
    with logs.MetricsLog(tmp_path, from_step=2) as log:
        log.write({"step": 3, "x": [1.0, 2.0]})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1}\n{"step": 2, "x": 1}\n{"step": 3, "x": [1.0, 2.0]}\n'
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    logs.MetricsLog(tmp_path, from_step=3).__exit__(None)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "within one second"


def test_a_disk_that_is_full_in_the_middle_of_a_row(tmp_path: Path) -> None:
    class Full:
        """A file that takes five bytes, and then none."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 5

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            count, self.room = self.file.write(data[: self.room]), 0
            return count

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with logs.MetricsLog(tmp_path) as log:
        log.write({"step": 1})
        log._lines = Full(log._lines)
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            log.write({"step": 2})
    assert _rows(tmp_path) == [1]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
