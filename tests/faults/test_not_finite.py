"""NaN and infinity are reported with the first layer and weights where they appear, and JSON stays JSON."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny.hugging_face import loaded

import moejax
from moejax import CheckpointError, MoejaxError
from moejax.checkpoints.folder import BUNDLED
from moejax.checkpoints.verify import Verification
from moejax.cli.output import one_object
from moejax.models.finite import bad_leaves
from moejax.report import aggregate
from moejax.report.numbers import finite, listed, number

PROMPT = [3, 1, 4, 1, 5]


def broken(lm: moejax.LM, path: str, value: float = np.nan) -> moejax.LM:
    """The model with one value of a leaf in every row."""

    def change(where: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(where, simple=True, separator=".")
        return leaf.at[..., 0].set(value) if name == path else leaf

    return moejax.LM(jax.tree_util.tree_map_with_path(change, lm.decoder), name="broken")


PLACES = {
    "embedding": "the embedding; not finite are the weights embedding",
    "layers.2.feed_forward.experts.down": "layer 2, at 'feed_forward.2'; not finite are the weights layers.2",
    "layers.1.attention.output.weight": "layer 1, at 'attention.1'",
    "layers.3.feed_forward.router.weight": "layer 3, at 'router_logits.3'",
    "layers.0.attention_norm.weight": "layer 0, at 'attention_norm.0'",
    "norm.weight": "the final norm or the head; not finite are the weights norm.weight",
}


@pytest.mark.parametrize("path", PLACES)
def test_explain_says_where(path: str) -> None:
    lm = broken(loaded("olmoe"), path)
    with pytest.raises(MoejaxError, match=f"broken: the explained values are not finite; .*{PLACES[path]}"):
        moejax.explain(lm, PROMPT)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_says_where(options: dict[str, Any]) -> None:
    lm = broken(loaded("olmoe"), "layers.2.feed_forward.experts.down", np.inf)
    with pytest.raises(MoejaxError, match=r"prompt 0, 1 are not finite, so no token can be chosen; .*layer 2"):
        lm.generate_tokens([PROMPT, PROMPT[:3]], max_new_tokens=3, **options)


def test_only_the_prompt_that_meets_it_is_named() -> None:
    lm = loaded("llama")
    embedding = lm.decoder.embedding.at[7].set(jnp.nan)
    lm = broken(moejax.LM(jax.tree.map(lambda x: embedding if x is lm.decoder.embedding else x, lm.decoder)), "")
    with pytest.raises(MoejaxError, match=r"the logits of prompt 1 are not finite.*the embedding"):
        lm.generate_ids([[3, 4, 5], [3, 7, 5]], max_new_tokens=2)
    with pytest.raises(MoejaxError, match="the embedding"):
        moejax.explain_batch(lm, [[3, 4, 5], [3, 7]]) if hasattr(moejax, "explain_batch") else moejax.explain(
            lm, [3, 7]
        )


def test_sound_models_say_nothing() -> None:
    found = loaded("olmoe").generate_tokens([PROMPT], max_new_tokens=2)
    assert found.finite is not None
    assert np.asarray(found.finite).tolist() == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moejax.explain(loaded("olmoe"), PROMPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with NaN in a tensor of layer 2."""
    folder = Path(shutil.copytree(BUNDLED / "tiny-olmoe", tmp_path_factory.mktemp("nan") / "model"))
    tensors = {key: value.copy() for key, value in load_file(folder / "model.safetensors").items()}
    key = next(key for key in tensors if "layers.2" in key and "experts" in key)
    tensors[key][..., 0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_load_checks_on_request(folder: Path) -> None:
    lm = moejax.load(folder)
    assert [path.split(".")[:4] for path, _ in bad_leaves(lm.decoder)] == [["layers", "2", "feed_forward", "experts"]]
    with pytest.raises(CheckpointError, match=r"values of layers\.2\.feed_forward\.experts\.\w+ are NaN or infinite"):
        moejax.load(folder, check_weights=True)
    moejax.load("tiny-olmoe", check_weights=True)


def test_json_has_null_for_what_is_no_number() -> None:
    assert (number(np.nan), number(-np.inf), number(1)) == (None, None, 1.0)
    assert listed(np.array([[1.0, np.nan], [np.inf, 2.0]])) == [[1.0, None], [None, 2.0]]
    assert listed(np.array([1, 2])) == [1, 2]
    assert finite({"a": [1.0, float("nan"), {"b": float("inf")}], "c": "x"}) == {
        "a": [1.0, None, {"b": None}],
        "c": "x",
    }
    assert one_object({"a": float("nan"), "b": 1}) == '{"a": null, "b": 1}'


def test_results_of_all_kinds_are_json() -> None:
    result = moejax.explain(loaded("olmoe"), PROMPT)
    layers, heads = result.layers.copy(), np.full_like(result.heads, np.nan)
    layers[0, 1, 2] = np.inf
    ledger = replace(result.ledger, target=np.full_like(result.ledger.target, np.nan))
    result = replace(result, ledger=ledger, layers=layers, heads=heads)
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["targets"][0]["value"] is report["targets"][0]["ledger"]["residual"] is None
    assert np.isnan(aggregate.floats(report["targets"][0]["layers"])[1, 2])
    verified = Verification("m", "float32", (1, 2), float("nan"), float("inf"), 0.0, (), {"a": 1}, {})
    assert json.loads(json.dumps(verified.to_dict(), allow_nan=False))["relative_rms"] is None
    assert verified.passed is False
