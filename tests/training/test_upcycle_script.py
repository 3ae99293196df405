"""``scripts/upcycle_smollm2.py`` from end to end, at toy size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.models import Decoder, family

ROOT = Path(__file__).parents[2]
HUGGING_FACE = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
pytestmark = pytest.mark.slow


def test_script(corpus_folder: Path, tmp_path: Path) -> None:
    corpus, model, out = corpus_folder, tmp_path / "model", tmp_path / "out"
    decoder = Decoder.init(family("llama").config(HUGGING_FACE), jax.random.key(0))
    moejax.export(moejax.LM(decoder, hugging_face=HUGGING_FACE), model, progress=False)
    shutil.copy(corpus / "tokenizer.json", model)
    options = {
        "model": model, "corpus": corpus, "out": out, "experts": 6, "selected": 2, "drop": 0.0, "steps": 20,
        "report-every": 10, "batch": 5, "length": 32, "learning-rate": 1e-2, "compute-dtype": "float32",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "upcycle_smollm2.py"), "--dense", "--export"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((out / "upcycle.json").read_text())
    assert found["before_training"]["relative_rms"] < 1e-5
    mixture, dense = found["runs"]["mixture"], found["runs"]["dense"]
    assert mixture["before"]["heldout"] == pytest.approx(dense["before"]["heldout"], abs=1e-4)
    assert mixture["after"]["heldout"] < mixture["before"]["heldout"] - 0.2
    assert np.shape(mixture["after"]["entropy"]) == (2,)
    trained = moejax.load(out / "model")
    assert trained.config.model_type == "mixtral"
    assert trained.decoder.embedding.dtype == jnp.bfloat16
    # documents are ended by the model's token, and are those of the corpus
    with np.load(out / "heldout.npz") as ours, np.load(corpus / "heldout.npz") as theirs:
        assert (ours["tokens"][ours["doc_starts"][1:] - 1] == 0).all()
        assert len(ours["doc_starts"]) == len(theirs["doc_starts"])
