"""Conversion needs memory for a layer, not for the model."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .files import GPT_OSS, OLMOE, gpt_oss_shapes, write_sparse, write_sparse_shards

_ROOT = Path(__file__).parents[2]
_ALLOWED = 512 << 20


def _convert(source: Path, destination: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "moejax", "convert", str(source), str(destination), "--json", *options]
    # a separate process, since a process reports the peak since its start
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _check(tmp_path: Path, layer: int, total: int, *options: str) -> None:
    """Convert ``tmp_path/source`` and check the peak.

    ``layer`` and ``total`` are the bytes of its largest layer and of the model, as they are written.
    """
    assert total > layer + _ALLOWED, "the model must be too large to be held at once"
    done = _convert(tmp_path / "source", tmp_path / "destination", *options)
    shutil.rmtree(tmp_path / "destination")
    print(f"layer {layer / 2**20:.0f} MiB, model {total / 2**20:.0f} MiB, {done}")
    assert done["peak_bytes"] <= layer + _ALLOWED


def _olmoe(tmp_path: Path, config: dict, *options: str, wider: int = 1) -> None:
    layer = write_sparse_shards(tmp_path / "source", config)
    total = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    _check(tmp_path, wider * layer, wider * total, *options)


def test_peak_is_a_layer(tmp_path: Path) -> None:
    """1.1 GB in layers of 102 MiB."""
    size = {"hidden_size": 1024, "intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 10}
    _olmoe(tmp_path, OLMOE | size)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "wider"), [((), 1), (("--dtype", "float16"), 1), (("--dtype", "float32"), 2)])
def test_peak_is_a_layer_when_it_is_large(tmp_path: Path, options: tuple[str, ...], wider: int) -> None:
    """3 GB in layers of 408 MiB; in float32 a layer is twice as large as in the files."""
    size = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": 6}
    _olmoe(tmp_path, OLMOE | size | {"vocab_size": 50304}, *options, wider=wider)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_peak_is_a_layer_where_it_is_transposed_or_packed(tmp_path: Path, packed: bool) -> None:
    """1.7 GB in layers of 379 MiB, counted as they are written, in bfloat16."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(GPT_OSS))
    write_sparse(tmp_path / "source" / "model.safetensors", gpt_oss_shapes(GPT_OSS, packed=packed))
    shapes = {key: 2 * math.prod(shape) for key, (_, shape) in gpt_oss_shapes(GPT_OSS, packed=False).items()}
    layer = sum(size for key, size in shapes.items() if key.startswith("model.layers.0."))
    _check(tmp_path, layer, sum(shapes.values()))
