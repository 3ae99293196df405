"""Registered layers under ``analyse``: null routes, experts without a product, and what their experts put out."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from moejax import LM
from moejax.layers import registered
from moejax.models import Decoder, family
from moejax.report.routing import routing_tables
from moejax.report.routing_plots import routing_figures
from moejax.study import Documents, Windows, analyse, similarities

E, K, V = 6, 3, 53
FIELDS = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": E, "num_experts_per_tok": K, "max_position_embeddings": 128,
    # the first and the last, with a dense one between them
    "moe_layers": [0, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def windows() -> Windows:
    rng = np.random.default_rng(0)
    # the last window is shorter than the batch's width, so that there is padding
    return Windows(Documents([rng.integers(2, V, size) for size in (32, 32, 27)], np.zeros(3, int)), 32, 3)


def model(name: str) -> LM:
    decoder = Decoder.init(family("moejax").config(FIELDS | {"moe": name}), jax.random.key(0))
    # away from the initial weights, with which experts hardly differ
    return LM(jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, decoder))


def with_nulls(lm: LM) -> LM:
    """The same with a ternary router that selects null routes now and then."""
    for i in FIELDS["moe_layers"]:
        layer: Any = lm.decoder.layers[i].feed_forward
        nulls = 9 * jax.random.normal(jax.random.key(i), (K, FIELDS["hidden_size"]))
        lm.decoder.layers[i].feed_forward = layer.replace(gate_weight=layer.gate_weight.at[2 * E :].set(nulls))
    return LM(lm.decoder)


def cosines(outputs: np.ndarray) -> float:
    unit = outputs / np.linalg.norm(outputs, axis=-1, keepdims=True)
    n = len(outputs)
    return float(((unit @ unit.T).sum() - n) / (n * (n - 1)))


def seen_by_experts(lm: LM, layer: int, windows: Windows) -> tuple[np.ndarray, Any]:
    """The input ``[B T D]`` of the layer's mixture, and its routing."""
    kind: Any = type(lm.decoder.layers[layer].feed_forward)

    class Spy(kind):
        def forward(self, x: Any, return_id_experts: bool = False) -> Any:
            self.record("seen", x)
            return super().forward(x, return_id_experts)

    decoder = jax.tree.map(lambda leaf: leaf, lm.decoder)
    decoder.layers[layer].feed_forward.__class__ = Spy
    (batch,) = windows
    routes = jax.jit(lambda d, b: d.hidden(b.tokens, valid=b.valid).aux[layer])(decoder, batch)
    return np.asarray(routes.feed_forward.info["seen"], np.float64), routes.feed_forward.routing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoe_tcmoe", "smoe_plus_plus"])
def test_outputs_of_experts(name: str, windows: Windows) -> None:
    """Against numpy: SwiGLU of every expert that a token selected, without the special ones and the null routes."""
    lm = with_nulls(model(name)) if name == "smoe_tcmoe" else model(name)
    layers = analyse(lm, windows, outputs=True).mixtures["feed_forward"].layers
    assert [layer.layer for layer in layers] == [0, 2]
    values = []
    x, routing = seen_by_experts(lm, 2, windows)
    moe: Any = lm.decoder.layers[2].feed_forward
    first, second = (np.asarray(m, np.float64) for m in (moe.experts.gate_up, moe.experts.down))
    (batch,) = windows
    for b, t in np.argwhere(np.asarray(batch.valid)):
        ids, weights = np.asarray(routing.ids[b, t]), np.asarray(routing.weights[b, t])
        chosen = ids[(ids < E) & (weights != 0)]
        gate, up = np.einsum("emfd,d->mef", first[chosen], x[b, t])
        if len(chosen) > 1:
            values.append(cosines(np.einsum("edf,ef->ed", second[chosen], gate / (1 + np.exp(-gate)) * up)))
    assert 0 < len(values) < windows.num_tokens, "some tokens have one expert or none"
    assert layers[1].output_similarity == pytest.approx(np.mean(values), abs=1e-5)


def test_null_routes_are_no_experts(windows: Windows) -> None:
    lm = with_nulls(model("smoe_tcmoe"))
    found = analyse(lm, windows)
    for layer in found.mixtures["feed_forward"].layers:
        assert (layer.experts, layer.slots) == (E, K)
        assert layer.utilisation is not None
        assert layer.utilisation.shape == (E,)
        assert layer.utilisation.sum() == pytest.approx(1)
        assert layer.dead == ()
        assert layer.active_slots is not None
        assert layer.active_slots < K - 0.1, "null slots carry nothing"
        assert layer.output_similarity is None, "was not asked for"


def test_similarity_of_registered_weights() -> None:
    lm = model("smoe_plus_plus")
    for i, found in zip(FIELDS["moe_layers"], similarities(lm.decoder), strict=True):
        moe: Any = lm.decoder.layers[i].feed_forward
        assert moe.router.weight.shape[0] == E + 4, "a row for every route"
        joined = [np.asarray(m, np.float64).reshape(E, -1) for m in (moe.experts.gate_up, moe.experts.down)]
        assert found.experts == pytest.approx(cosines(np.concatenate(joined, -1)), abs=1e-6)
        assert found.router == pytest.approx(cosines(np.asarray(moe.router.weight, np.float64)), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(registered()))
def test_every_layer_is_analysed(name: str, windows: Windows) -> None:
    """Tables, plots and JSON of all statistics, for two mixture layers that a dense layer separates."""
    lm = model(name)
    found = analyse(lm, windows, against=lm, outputs=True, drop=1).to_dict()
    json.dumps(found, allow_nan=False)
    assert routing_tables(found)
    assert {"utilisation", "router", "coactivation", "layer_overlap"} <= routing_figures(found).keys()
    for layer in found["mixtures"]["feed_forward"]["layers"]:
        assert layer["tokens"] == windows.num_tokens
        assert sum(layer["utilisation"]) == pytest.approx(1, abs=1e-5)
        assert None not in (layer["expert_similarity"], layer["router_similarity"], layer["output_similarity"])
    assert [change["overlap"] for change in found["changes"]["feed_forward"]] == [1, 1]
