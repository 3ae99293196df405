"""Every notebook runs from top to bottom and shows the kinds of output that are stored with it."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FAST = ("01_explain", "03_experts")
"""Notebooks that run with the fast tests; the others take minutes and are slow tests."""
PRINTED = {
    "01_explain": ["largest residual of any ledger"],
    "02_convert_and_load": [
        "share of the device's",
        "peak host memory",
        "│ the same ",
        "cpu:3",
        "bit for bit",
        "dtypes, shapes and bytes",
        "missing model.layers.1.mlp.experts.7.up_proj.weight",
    ],
    "03_experts": ["decoder_feed_forward_3_ff_expert: (21, 16)", "correlation with what was predicted"],
    "04_write_a_rule": ["residual of the mistake", "relp ", "correlation with removal"],
    "05_build_a_moe_layer": ["largest difference from the dense layer", "effect of removal", "residual of the ledger"],
}
"""Texts that some cell of each notebook prints."""


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """Return the kinds of output of a cell: MIME types of plots and texts, names of streams."""
    return {kind for output in cell.outputs for kind in output.get("data", [output.get("name")])}


# zmq's event loop and jupyter's paths raise deprecation warnings inside the client
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "path", [p if p.stem in FAST else pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS], ids=lambda p: p.stem
)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    stored, run = (nbformat.read(path, as_version=4) for _ in range(2))
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(run, timeout=600, kernel_name="python3", coalesce_streams=True, resources=folder).execute()
    pairs = [pair for pair in zip(stored.cells, run.cells, strict=True) if pair[0].cell_type == "code"]
    for before, now in pairs:
        assert kinds(before) <= kinds(now), (
            f"cell {now.id} shows fewer kinds of output than stored; run the notebook and store it"
        )
    texts = [output.get("text", "") for _, now in pairs for output in now.outputs]
    for words in [*PRINTED[path.stem], "skipped: JAX has no GPU here"]:
        assert any(words in text for text in texts), f"no cell prints {words!r}"
