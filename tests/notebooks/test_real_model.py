"""The last part of every notebook, "A real model", on a random model on disk; and every cell of a notebook twice."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from moejax import LM, export
from moejax.checkpoints.folder import BUNDLED
from moejax.models import Decoder, family

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIG = {
    "model_type": "olmoe",
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PRINTED = {
    "01_explain": ["the logit of", "lost without it"],
    "02_convert_and_load": ["real: ", "LM('real'"],
    "03_experts": ["6 slots of the last token", "correlation with its relevance"],
    "04_write_a_rule": ["relp     residual", "attnlrp  residual"],
    "05_build_a_moe_layer": ["cosine of a token's expert outputs", "layer  2:"],
}
"""Texts that the last part of each notebook prints."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE in bfloat16 with the bundled tokenizer and a chat template, as on the hub."""
    made, rng = tmp_path_factory.mktemp("real") / "olmoe", np.random.default_rng(0)
    bundled = BUNDLED / "tiny-olmoe"
    config = CONFIG | {"vocab_size": json.loads((bundled / "config.json").read_text())["vocab_size"]}

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.numpy.asarray(0.3 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 1), leaf.dtype)

    decoder = jax.tree.map(draw, Decoder.abstract(family("olmoe").config(config), "bfloat16"))
    export(LM(decoder, hugging_face=config), made)
    shutil.copy(bundled / "tokenizer.json", made)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cells: list[Any]) -> str:
    return "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)


# zmq's event loop and jupyter's paths raise deprecation warnings inside the client
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_twice_and_the_last_part_takes_any_model(
    path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    asked = [cell for cell in code(notebook) if "\nREAL_MODEL = None" in cell.source]
    assert len(asked) == 1
    asked[0].source = asked[0].source.replace("REAL_MODEL = None", f"REAL_MODEL = {str(folder)!r}")
    twice = []
    for cell in code(notebook):
        again = deepcopy(cell)
        again.id = f"{cell.id}-again"
        twice += [cell, again]
    notebook.cells = twice
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", coalesce_streams=True)
    client.resources = {"metadata": {"path": str(tmp_path)}}
    client.execute()
    last = twice[twice.index(asked[0]) :]
    said = texts(last)
    assert "skipped" not in said
    for words in PRINTED[path.stem]:
        assert words in said, f"{words!r} is not in {said}"


@pytest.mark.fast
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_last_part_does_nothing_without_a_model(path: Path) -> None:
    """The cells after the one that asks for a model do nothing if ``real`` is ``None``."""
    cells = code(nbformat.read(path, as_version=4))
    start = next(i for i, cell in enumerate(cells) if "REAL_MODEL = None" in cell.source)
    assert "skipped: JAX has no GPU" in texts([cells[start]])
    assert cells[start + 1 :]
    for cell in cells[start + 1 :]:
        exec(cell.source, {"real": None})
        assert cell.outputs == []


@pytest.mark.fast
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_plain(path: Path) -> None:
    stored = path.read_text()
    assert len(stored) < 450_000
    assert "\\u001b" not in stored, "terminal codes show as rubbish in other viewers"
    said = texts(code(nbformat.read(path, as_version=4)))
    assert "/tmp/" not in said
    assert "site-packages" not in said, "no warnings of other libraries, which name folders"
