"""Streamed statistics against the formulas on all tokens at once; padding, batches, NaN, and nothing at all."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from moejax import LM, MoejaxError
from moejax.ops.mxfp4 import MXFP4
from moejax.report.routing import routing_tables
from moejax.report.routing_plots import routing_figures
from moejax.routing import Routing
from moejax.routing import statistics as s
from moejax.study import Analysis, Documents, WindowBatch, Windows, analyse, compare, similarities
from moejax.study.accumulators import MixtureSizes, routing_sums
from moejax.study.result import random_iou, routing_statistics
from moejax.study.similarity import Similarity, _products

V, L, E, K = 53, 2, 9, 5
# windows of 32 tokens cut from these have three sizes; the reference is compiled once for each
SIZES = (58, 26, 26, 1, 26)
UNKNOWN = Similarity(None, None)


@pytest.fixture(scope="module")
def documents() -> Documents:
    rng = np.random.default_rng(0)
    # ids from the first ten, so that some come often enough to count for specialisation
    tokens = [rng.integers(2, 12, size) for size in SIZES]
    return Documents(tokens, np.array([0, 1, 1, 2, 0]), ("a", "b", "unseen c"))


@pytest.fixture(scope="module")
def windows(documents: Documents) -> Windows:
    return Windows(documents, 32, 3)


@pytest.fixture(scope="module")
def analysis(toy_lm: LM, windows: Windows) -> Analysis:
    return analyse(toy_lm, windows, by_token=True)


@pytest.fixture(scope="module")
def at_once(toy_lm: LM, windows: Windows) -> dict[str, Any]:
    """Routing [L n ..] of all tokens, window by window without padding, with their ids, labels and losses."""
    found: dict[str, list] = {name: [] for name in ("logits", "ids", "weights", "tokens", "labels", "losses")}

    @jax.jit
    def run(tokens: jax.Array) -> Any:
        hidden = toy_lm.decoder.hidden(tokens)
        return hidden.aux, toy_lm.decoder.logits(hidden.stream)

    for tokens, label in zip(windows.documents.tokens, windows.documents.labels, strict=True):
        for start in range(0, len(tokens), 32):
            window, after = tokens[start : start + 32], tokens[start + 1 : start + 33]
            routes, logits = run(jnp.asarray(window[None], jnp.int32))
            for name in ("logits", "ids", "weights"):
                found[name].append(np.stack([getattr(r.feed_forward.routing, name)[0] for r in routes]))
            p = np.asarray(logits[0], np.float64)
            p = p - np.log(np.exp(p).sum(-1, keepdims=True))
            found["losses"].append(-p[np.arange(len(after)), after])
            found["tokens"].append(window)
            found["labels"].append(np.full(len(window), label))
    axis = {"tokens": 0, "labels": 0, "losses": 0}
    return {name: np.concatenate(parts, axis.get(name, 1)) for name, parts in found.items()}


def test_sums_of_entropies_and_margins(analysis: Analysis, at_once: dict[str, Any]) -> None:
    for layer, logits, weights in zip(
        analysis.mixtures["feed_forward"].layers, at_once["logits"], at_once["weights"], strict=True
    ):
        logits, weights = jnp.asarray(logits), jnp.asarray(weights)
        assert layer.tokens == analysis.tokens == logits.shape[0]
        assert layer.nan_tokens == 0
        want = {
            "router_entropy": s.router_entropy(logits).mean() / np.log(E),
            "router_entropy_nats": s.router_entropy(logits).mean(),
            "weight_entropy": s.weight_entropy(weights).mean() / np.log(K),
            "router_margin": s.router_margin(logits).mean(),
            "weight_margin": s.weight_margin(weights).mean(),
            "active_slots": K,
        }
        for name, value in want.items():
            assert getattr(layer, name) == pytest.approx(float(value), rel=1e-4), name


def test_counts(analysis: Analysis, at_once: dict[str, Any]) -> None:
    for i, layer in enumerate(analysis.mixtures["feed_forward"].layers):
        ids, weights = at_once["ids"][i], at_once["weights"][i]
        chosen = np.zeros((len(ids), E))
        np.put_along_axis(chosen, ids, 1, axis=-1)
        counts = chosen.sum(0)
        np.testing.assert_allclose(layer.utilisation, counts / counts.sum(), rtol=1e-5)
        first = np.bincount(np.take_along_axis(ids, weights.argmax(-1)[:, None], -1)[:, 0], minlength=E)
        np.testing.assert_allclose(layer.first_choice, first / len(ids), rtol=1e-5)
        np.testing.assert_allclose(
            layer.coactivation, chosen.T @ chosen / np.maximum(counts, 1)[:, None], rtol=1e-5, atol=1e-7
        )
        assert layer.dead == tuple(np.flatnonzero(counts == 0))
        assert layer.jain_index == pytest.approx(counts.sum() ** 2 / (E * (counts**2).sum()), rel=1e-5)
        assert layer.largest_load == pytest.approx(E * counts.max() / counts.sum(), rel=1e-5)
        p = counts[counts > 0] / counts.sum()
        assert layer.relative_perplexity == pytest.approx(np.exp(-(p * np.log(p)).sum()) / E, rel=1e-5)


def test_groups(analysis: Analysis, at_once: dict[str, Any]) -> None:
    for i, layer in enumerate(analysis.mixtures["feed_forward"].layers):
        by_label, by_token = np.zeros((3, E)), np.zeros((V, E))
        for slot in range(K):
            np.add.at(by_label, (at_once["labels"], at_once["ids"][i][:, slot]), 1)
            np.add.at(by_token, (at_once["tokens"], at_once["ids"][i][:, slot]), 1)
        np.testing.assert_allclose(layer.label_usage, by_label / by_label.sum(-1, keepdims=True), rtol=1e-5)
        assert layer.label_divergence == pytest.approx(float(jax.jit(s.divergence)(by_label)), rel=1e-4)
        assert layer.token_ids == (by_token.sum(-1) >= 32).sum() > 1
        assert layer.token_specialisation == pytest.approx(
            float(jax.jit(s.specialisation)(by_token[by_token.sum(-1) >= 32])), rel=1e-4
        )


def test_overlap_of_layers(analysis: Analysis, at_once: dict[str, Any]) -> None:
    sets = [[set(row) for row in layer.tolist()] for layer in at_once["ids"]]
    want = np.mean([len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)])
    found = analysis.mixtures["feed_forward"]
    np.testing.assert_allclose(found.layer_overlap, [[1, want], [want, 1]], rtol=1e-5)
    assert found.random_overlap == random_iou(E, K)


def test_random_overlap_is_that_of_draws() -> None:
    rng = np.random.default_rng(0)
    draws = [[set(rng.permutation(7)[:3]) for _ in range(2)] for _ in range(4000)]
    assert random_iou(7, 3) == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in draws]), abs=0.012)
    assert random_iou(5, 5) == random_iou(1, 1) == 1


def test_loss(analysis: Analysis, at_once: dict[str, Any], windows: Windows) -> None:
    assert analysis.predictions == len(at_once["losses"]) == windows.num_tokens - len(windows.documents.tokens)
    assert analysis.loss == pytest.approx(at_once["losses"].mean(), rel=1e-5)
    assert analysis.label_loss[2] is None, "one token predicts nothing"
    known = np.array(analysis.label_loss[:2], float)
    assert np.average(known, weights=[58 + 26 - 2, 26 + 26 - 2]) == pytest.approx(analysis.loss, rel=1e-5)


def test_batches_and_padding_change_nothing(
    toy_lm: LM, analysis: Analysis, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it matter when the host takes the device's sums."""
    monkeypatch.setattr("moejax.study.accumulate._FLUSH", 1)
    other = analyse(toy_lm, Windows(documents, 32, 4), by_token=True).to_dict()

    def same(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                same(a[key], b[key], f"{path}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), path
            for i, pair in enumerate(zip(a, b, strict=True)):
                same(*pair, f"{path}[{i}]")
        elif isinstance(a, float):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=path)
        else:
            assert a == b, path

    same(analysis.to_dict(), other, "")
    json.dumps(other, allow_nan=False)


def test_nan_is_reported_with_its_layer(toy_lm: LM, windows: Windows) -> None:
    layers = list(toy_lm.decoder.layers)
    router = layers[1].feed_forward.router
    weight = router.weight.at[3].set(jnp.nan)
    layers[1] = replace(layers[1], feed_forward=replace(layers[1].feed_forward, router=replace(router, weight=weight)))
    found = analyse(LM(replace(toy_lm.decoder, layers=layers)), windows)
    good, bad = found.mixtures["feed_forward"].layers
    assert (good.tokens, good.nan_tokens, bad.tokens, bad.nan_tokens) == (sum(SIZES), 0, 0, sum(SIZES))
    assert good.router_entropy is not None
    assert bad.router_entropy is bad.utilisation is bad.dead is None
    assert found.loss is None
    shown = found.to_dict()
    json.dumps(shown, allow_nan=False)
    table = io.StringIO()
    Console(file=table, width=80).print(*routing_tables(shown))
    assert f"NaN in layer 1       │ in the router's output, {sum(SIZES)} of {sum(SIZES)} tokens" in table.getvalue()
    assert "utilisation" in routing_figures(shown)


# ---- sums of routing that no published model has -------------------------------------------------------------------


def a_batch(tokens: int, valid: np.ndarray | None = None) -> WindowBatch:
    ids = jnp.asarray(np.arange(tokens)[None] % V, jnp.int32)
    where = jnp.ones((1, tokens), bool) if valid is None else jnp.asarray(valid[None])
    return WindowBatch(ids, ids, where, where, jnp.zeros(1, jnp.int32))


def statistics_of(routing: Routing, batch: WindowBatch, experts: int) -> Any:
    mixture = MixtureSizes(4, experts, routing.weights.shape[-1], routing.logits.shape[-1])
    sums = jax.tree.map(np.asarray, routing_sums([routing], batch, experts, 1))
    return routing_statistics([mixture], sums, False, [UNKNOWN])


def routing(logits: Any, ids: Any, weights: Any) -> Routing:
    logits = jnp.asarray(logits, jnp.float32)[None]
    return Routing(logits, logits, jnp.asarray(ids, jnp.int32)[None], jnp.asarray(weights, jnp.float32)[None])


def test_slots_that_carry_nothing_and_signs() -> None:
    """Seven routes to four experts: two slots to one expert, negative weights, an empty slot, an empty token."""
    ids = [[1, 1, 2], [3, 0, 0], [0, 2, 3]]
    weights = [[0.5, -0.25, 0.25], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    (layer,) = statistics_of(routing(np.zeros((3, 7)), ids, weights), a_batch(3), 4).layers
    np.testing.assert_allclose(layer.utilisation, [0, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(layer.first_choice, [0, 0.5, 0, 0.5])
    assert layer.dead == (0,)
    assert layer.active_slots == pytest.approx(4 / 3)
    assert layer.router_entropy == pytest.approx(1)
    # the mean is over the two tokens that were routed
    assert layer.weight_entropy_nats == pytest.approx(1.5 * np.log(2) / 2, rel=1e-6)
    assert layer.weight_margin == pytest.approx((0.25 + 1) / 2)


def test_nan_tokens_do_not_count() -> None:
    logits, weights = np.zeros((3, 4)), np.full((3, 2), 0.5)
    logits[1, 2], weights[2, 0] = np.nan, np.inf
    (layer,) = statistics_of(routing(logits, [[0, 1], [2, 3], [2, 3]], weights), a_batch(3), 4).layers
    assert (layer.tokens, layer.nan_tokens) == (1, 2)
    np.testing.assert_allclose(layer.utilisation, [0.5, 0.5, 0, 0])


def test_nothing_but_padding_is_absent() -> None:
    found = statistics_of(routing(np.zeros((3, 4)), [[0, 1]] * 3, [[0.5, 0.5]] * 3), a_batch(3, np.zeros(3, bool)), 4)
    (layer,) = found.layers
    assert found.layer_overlap is None
    values = {name: value for name, value in vars(layer).items() if value is not None}
    assert values == {"layer": 4, "experts": 4, "slots": 2, "tokens": 0, "nan_tokens": 0}


@pytest.mark.parametrize(("experts", "slots"), [(1, 1), (3, 3)])
def test_one_expert_or_all(experts: int, slots: int) -> None:
    """One token: with one expert there is nothing to choose, so entropies and margins are absent, not 0 / 0."""
    found = statistics_of(
        routing(np.zeros((1, experts)), [list(range(slots))], [[1 / slots] * slots]), a_batch(1), experts
    )
    (layer,) = found.layers
    assert layer.jain_index == pytest.approx(1)
    assert layer.relative_perplexity == pytest.approx(1)
    assert layer.dead == ()
    assert (layer.router_entropy is None) == (layer.weight_margin is None) == (experts == 1)
    assert found.random_overlap == 1
    if experts > 1:
        assert layer.weight_entropy == pytest.approx(1)


# ---- two checkpoints, weights --------------------------------------------------------------------------------------


def ids_of(lm: LM, windows: Windows) -> list[np.ndarray]:
    """The selected experts of all tokens, layer by layer."""
    found: list[list[np.ndarray]] = [[] for _ in range(L)]
    for batch in windows:
        routes = jax.jit(lambda b: lm.decoder.hidden(b.tokens, valid=b.valid).aux)(batch)
        for layer, route in zip(found, routes, strict=True):
            layer.append(np.asarray(route.feed_forward.routing.ids)[np.asarray(batch.valid)])
    return [np.concatenate(layer) for layer in found]


def test_compare_with_another(make_olmoe: Callable, toy_lm: LM, windows: Windows) -> None:
    import moejax

    other = moejax.load(make_olmoe(seed=1))
    found = compare(toy_lm, other, windows)["feed_forward"]
    mine, theirs = (ids_of(lm, windows) for lm in (toy_lm, other))
    for change, a, b in zip(found, mine, theirs, strict=True):
        want = np.mean([len(set(x) & set(y)) / K for x, y in zip(a.tolist(), b.tolist(), strict=True)])
        assert 0 < want < 1
        assert change.overlap == pytest.approx(want, rel=1e-5)
        assert change.switch_rate == pytest.approx(1 - want, rel=1e-5)
        assert change.tokens == windows.num_tokens


@pytest.mark.parametrize("change", [{"num_experts": 7}, {"num_hidden_layers": 1}, {"vocab_size": 51}])
def test_compare_refuses_another_model(make_olmoe: Callable, toy_lm: LM, windows: Windows, change: dict) -> None:
    import moejax

    with pytest.raises(MoejaxError, match="not checkpoints of one model"):
        compare(toy_lm, moejax.load(make_olmoe(**change)), windows)


def test_similarity_of_weights(toy_lm: LM) -> None:
    for layer, found in zip(toy_lm.decoder.layers, similarities(toy_lm.decoder), strict=True):
        moe: Any = layer.feed_forward
        joined = np.concatenate(
            [np.asarray(w, np.float64).reshape(E, -1) for w in (moe.experts.gate_up, moe.experts.down)], -1
        )
        for rows, value in ((joined, found.experts), (np.asarray(moe.router.weight, np.float64), found.router)):
            unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
            cosines = unit @ unit.T
            assert value == pytest.approx((cosines.sum() - E) / (E * (E - 1)), abs=1e-6)


def test_similarity_of_packed_weights() -> None:
    packed = MXFP4.random(jax.random.key(0), (3, 5, 64))
    rows = np.asarray(packed.unpack(jnp.float32), np.float64).reshape(3, -1)
    np.testing.assert_allclose(_products(packed), rows @ rows.T, rtol=1e-5)


def test_windows_longer_than_the_context(toy_lm: LM, documents: Documents) -> None:
    with pytest.raises(MoejaxError, match="windows of 129 tokens"):
        analyse(toy_lm, Windows(documents, 129))
