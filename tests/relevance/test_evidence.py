"""Evidence that relevance is right: where none may be, against finite differences, and with weights drawn anew.

What a test looks at is read once and shared: the toy is small, and compiling it is what takes time.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, ROW, D, E, F, K, T, make_config, noisy, variant_lm
from tiny.tokenizers import word_tokenizer

import moejax
from moejax import LM, Contrast, Gates, MoejaxError, Relevance, Token, explain
from moejax.layers import RouterConfig
from moejax.relevance.engine import relevance
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.seeds import LogitSeeds
from moejax.rules import RULES, AttnLRP, Plain, Reading

LAYERS = 2
NAMES = ("attnlrp", "attnlrp-uniform", "gim", "proportional", "plain")
every_rule = pytest.mark.parametrize("rule", NAMES)
AT = 4
AIM = Contrast(11, 60, AT)
NODES = [n for n in moejax.nodes(variant_lm("plain")).names if n.rpartition(".")[0] in moejax.relevance.NODES]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def read(rule: str) -> Relevance:
    """Every readout under a rule, in double precision."""
    with jax.enable_x64(True):
        return explain(variant_lm("plain", dtype="float64"), PROMPT, target=AIM, rule=rule, nodes=NODES)


def assert_same(got: Relevance, want: Relevance) -> None:
    for name in ("layers", "experts", "heads"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), **CLOSE, err_msg=name)
    assert got.vectors.keys() == want.vectors.keys()
    for name in got.vectors:
        np.testing.assert_allclose(got.vectors[name], want.vectors[name], **CLOSE, err_msg=name)
    np.testing.assert_allclose(got.ledger.target, want.ledger.target, **CLOSE)


class TestWhereNoneMayBe:
    @every_rule
    def test_nothing_after_the_target(self, rule):
        found = read(rule)
        for part in (found.layers, found.heads, found.experts):
            assert part[:, :, AT].any()
            assert not part[:, :, AT + 1 :].any(), "exactly zero"
        for node, vector in found.vectors.items():
            later = vector[..., AT + 1 :, :] if node.startswith("edges") else vector[:, AT + 1 :]
            assert not later.any(), node
            if node.startswith("edges"):
                assert not np.triu(vector, 1).any(), "of a key behind its query"

    @every_rule
    def test_feed_forward_moves_nothing_between_tokens(self, rule):
        """The last layer's is entered from above at the target's token alone."""
        vectors = read(rule).vectors
        for node in ("feed_forward", "neurons", "feed_forward_norm", "middle"):
            of_tokens = np.abs(vectors[f"{node}.{LAYERS - 1}"][0]).reshape(T, -1).sum(-1)
            assert of_tokens[AT] > 0
            assert not np.delete(of_tokens, AT).any(), node

    @every_rule
    def test_nodes_add_up_to_gates(self, rule):
        found, exact = read(rule), {"rtol": 1e-10, "atol": 1e-11}
        totals = {name: vector[0].sum(-1) for name, vector in found.vectors.items()}
        for layer in range(LAYERS):
            np.testing.assert_allclose(totals[f"stream.{layer}"], found.layers[0, layer], **exact)
            np.testing.assert_allclose(totals[f"edges.{layer}"].T, found.heads[0, layer], **exact)
            np.testing.assert_allclose(totals[f"attention.{layer}"], found.heads[0, layer].sum(-1), **exact)
            np.testing.assert_allclose(totals[f"feed_forward.{layer}"], found.experts[0, layer].sum(-1), **exact)
            # this rule sends half of an expert's relevance to its weight
            part = 0.5 if rule == "attnlrp-uniform" else 1
            np.testing.assert_allclose(totals[f"neurons.{layer}"], part * found.experts[0, layer], **exact)
        np.testing.assert_allclose(totals[f"stream.{LAYERS}"], found.layers[0, LAYERS], **exact)
        for layer in range(LAYERS):
            # between both parts of a layer there is all that there was above, less what the feed-forward part leaks
            leaks = found.ledger.leaks
            leaked = sum(leaks[name][0, layer] for name in leaks if name in ("router", "activation"))
            above = totals[f"stream.{layer + 1}"].sum() - leaked
            if rule != "plain":  # whose norms leak in both parts
                np.testing.assert_allclose(totals[f"middle.{layer}"].sum(), above, **exact)

    def test_neurons_of_an_expert(self):
        found = read("attnlrp")
        expert = int(found.expert_ids[1, AT, 0])
        neurons = found.neurons(1, expert)
        assert neurons.shape == (1, T, F)
        np.testing.assert_allclose(neurons[0, AT].sum(), found.experts[0, 1, AT, 0], rtol=1e-10)
        with pytest.raises(MoejaxError, match=r"neurons of layer 1 were not read; explain with nodes=\['neurons.1'\]"):
            replace(found, vectors={}).neurons(1, expert)


class TestSameNumbers:
    """However the pass is arranged; ``test_explain`` has chunks, and a pass that is not compiled."""

    TARGET = Token(11)
    ROWS = (PROMPT[2:6], PROMPT)

    def test_padding_on_either_side(self):
        lm, rows = variant_lm("clip-bias"), self.ROWS
        length = len(rows[0])
        want = explain(lm, rows[0], target=self.TARGET)
        assert_same(moejax.explain_batch(lm, rows, target=self.TARGET)[0], want)
        tokens = jnp.asarray([row + [1] * (T - len(row)) for row in rows], jnp.int32)
        lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
        seeds = LogitSeeds.of(lengths[:, None] - 1, jnp.full((2, 1, 1), 11, jnp.int32), jnp.ones((2, 1, 1)))
        out = relevance(lm.flat, tokens, jnp.arange(T) < lengths[:, None], seeds, Gates(), rule=AttnLRP())
        np.testing.assert_allclose(out.gates.tokens[:, :, 0, :length], want.layers, **CLOSE)
        np.testing.assert_allclose(out.gates.slots[:, :, 0, :length], want.experts, **CLOSE)
        np.testing.assert_allclose(out.gates.heads[:, :, 0, :length], want.heads, **CLOSE)
        np.testing.assert_array_equal(out.routes.ids[:, 0, :length], want.expert_ids)
        assert not out.gates.tokens[:, :, 0, length:].any(), "padding has exactly none"

    @pytest.mark.parametrize("rematerialise", [pytest.param(True, marks=pytest.mark.slow), 1])
    def test_rematerialised(self, rematerialise):
        lm, options = variant_lm("clip-bias"), {"target": AIM, "nodes": ["edges.1", "neurons.0", f"stream.{LAYERS}"]}
        assert_same(explain(lm, PROMPT, rematerialise=rematerialise, **options), explain(lm, PROMPT, **options))


# ---- targets ------------------------------------------------------------------------------------------------------

STEP = 1e-5


@cache
def gated_passes():
    """Logits, router logits and streams as every token's embedding is in turn a little larger, then smaller."""
    lm = variant_lm("plain", dtype="float64")
    up = np.ones((LAYERS + 1, 2, T, T))
    up[0] += STEP * np.array([1, -1])[:, None, None] * np.eye(T)
    gates = Gates(tokens=jnp.asarray(up.reshape(LAYERS + 1, 2 * T, T)))
    tokens = jnp.tile(ROW, (2 * T, 1))
    hidden = jax.jit(lambda decoder: decoder.hidden(tokens, reading=Reading(gates=gates)))(lm.decoder)
    routers = [np.asarray(routing.logits) for routing in hidden.routing()]
    streams = [np.asarray(x) for x in [*hidden.entering, hidden.stream]]
    return np.asarray(lm(tokens, gates=gates)), routers, streams


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


VECTOR = np.random.default_rng(3).normal(size=D)
RIVALS = [60, 3, 8]
ANSWER = [PROMPT[5], PROMPT[6], 9]
TARGETS = {
    "mean": (moejax.MeanContrast(11, AT), lambda z, r, s: z[:, AT, 11] - z[:, AT].mean(-1)),
    "log-probability": (moejax.LogProbability(11, AT), lambda z, r, s: log_softmax(z)[:, AT, 11]),
    "span": (moejax.Span(ANSWER), lambda z, r, s: log_softmax(z)[:, [4, 5, 6], ANSWER].sum(-1)),
    "several": (Contrast(11, RIVALS, AT), lambda z, r, s: z[:, AT, 11] - np.log(np.exp(z[:, AT, RIVALS]).sum(-1))),
    "router": (moejax.RouterChoice(1, 2, versus=4, position=3), lambda z, r, s: r[1][:, 3, 2] - r[1][:, 3, 4]),
    "stream": (moejax.Direction(VECTOR, 1, 3), lambda z, r, s: s[1][:, 3] @ VECTOR),
    "last stream": (moejax.Direction(VECTOR, LAYERS, 3), lambda z, r, s: s[LAYERS][:, 3] @ VECTOR),
}


@pytest.mark.usefixtures("x64")
class TestTargets:
    @pytest.mark.parametrize("name", TARGETS)
    def test_plain_is_the_derivative(self, name):
        """Averages weighted by probabilities are the first order of logarithms."""
        target, function = TARGETS[name]
        prompt = PROMPT[:5] if name == "span" else PROMPT
        got = explain(variant_lm("plain", dtype="float64"), prompt, target=target, rule=Plain())
        up, down = function(*gated_passes()).reshape(2, T)
        want = (up - down) / (2 * STEP)
        assert got.tokens.shape == (1, T)
        np.testing.assert_allclose(got.tokens[0], want, rtol=1e-4, atol=1e-7)
        assert np.abs(want).max() > 1e-3

    def test_values(self):
        """What the ledger starts from; the average of all logits, and those weighted by their probabilities."""
        lm = variant_lm("plain", dtype="float64")
        z = np.asarray(lm(ROW))[0]
        p = np.exp(log_softmax(z))
        of_rivals = np.exp(log_softmax(z[AT, RIVALS]))
        wants = {
            "mean": z[AT, 11] - z[AT].mean(),
            "log-probability": z[AT, 11] - p[AT] @ z[AT],
            "span": sum(z[4 + i, a] - p[4 + i] @ z[4 + i] for i, a in enumerate(ANSWER)),
            "several": z[AT, 11] - of_rivals @ z[AT, RIVALS],
        }
        for name, (target, _) in TARGETS.items():
            books = explain(lm, PROMPT[:5] if name == "span" else PROMPT, target=target, rule=Plain()).ledger
            if name in wants:
                np.testing.assert_allclose(books.target, [wants.pop(name)], rtol=1e-10)
            np.testing.assert_allclose(books.residual, 0, atol=1e-11, err_msg=name)
        assert not wants

    @pytest.mark.parametrize("layer", range(LAYERS + 1))
    def test_stream_that_a_layer_reads(self, layer):
        """All relevance of a direction is of the stream there, at its token."""
        target = moejax.Direction(VECTOR, layer, 3)
        found = explain(variant_lm("plain", dtype="float64"), PROMPT, target=target, nodes=[f"stream.{layer}"])
        np.testing.assert_allclose(found.layers[0, layer, 3], found.ledger.target[0], rtol=1e-10)
        np.testing.assert_allclose(found.vectors[f"stream.{layer}"][0, 3].sum(), found.ledger.target[0], rtol=1e-10)
        np.testing.assert_allclose(found.ledger.residual, 0, atol=1e-11)

    def test_router_that_keeps_a_share(self):
        """The operation that the target's logits have entered is left for the target."""
        lm = variant_lm("plain", dtype="float64")
        books = explain(lm, PROMPT, target=TARGETS["router"][0], rule="attnlrp-uniform").ledger
        np.testing.assert_allclose(books.residual, 0, atol=1e-11)

    def test_labels(self):
        lm = variant_lm("plain", dtype="float64")
        labels = {
            name: explain(lm, PROMPT[:5] if name == "span" else PROMPT, target=target, rule=Plain()).labels
            for name, (target, _) in TARGETS.items()
            if name != "stream"
        }
        assert labels == {
            "mean": ["'w11' - mean"],
            "log-probability": ["log p('w11')"],
            "span": [" + ".join(f"log p('w{i}')" for i in ANSWER)],
            "several": ["'w11' - average of 'w60', 'w3', 'w8'"],
            "router": ["layer 1: expert 2 - expert 4"],
            "last stream": [f"stream {LAYERS} along a direction"],
        }


# ---- experts ------------------------------------------------------------------------------------------------------


class TestExperts:
    def test_slots_that_share_an_expert_or_select_none(self):
        slots, weights = np.array([0.5, -0.25, 0.0]), np.array([0.4, -0.1, 0.0])
        found = ExpertRelevance(slots.reshape(1, 1, 1, 3), np.array([[[2, 2, 0]]]), weights.reshape(1, 1, 3), 3)
        np.testing.assert_array_equal(found.by_expert(), [[[0, 0, 0.25]]])
        np.testing.assert_array_equal(found.by_token(), [[[[0, 0, 0.25]]]])
        np.testing.assert_array_equal(found.by_expert("count"), [[[0, 0, 2]]])
        np.testing.assert_array_equal(found.by_expert("mean"), [[[0, 0, 0.125]]])

    def test_by_expert(self):
        found = read("attnlrp").feed_forward
        want = {how: np.zeros((1, LAYERS, E)) for how in ("sum", "absolute", "positive", "count")}
        for layer, t, k in np.ndindex(LAYERS, T, K):
            at, value = (0, layer, found.ids[layer, t, k]), found.slots[0, layer, t, k]
            for how, add in (("sum", value), ("absolute", abs(value)), ("positive", max(value, 0)), ("count", 1)):
                want[how][at] += add
        want["mean"] = np.divide(want["sum"], want["count"], out=np.zeros((1, LAYERS, E)), where=want["count"] > 0)
        for how, values in want.items():
            np.testing.assert_allclose(found.by_expert(how), values, rtol=1e-12, atol=1e-14, err_msg=how)
        np.testing.assert_allclose(found.by_token().sum(2), want["sum"], rtol=1e-12, atol=1e-14)
        with pytest.raises(
            MoejaxError, match="how='median' is unknown; choose from sum, absolute, positive, count, mean"
        ):
            found.by_expert("median")

    @every_rule
    def test_advantage_is_over_the_mixture(self, rule):
        found = read(rule).feed_forward
        advantage = found.advantage()
        np.testing.assert_allclose((found.weights * advantage).sum(-1), 0, atol=1e-11)
        assert np.abs(advantage).max() > 1e-3

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(("score", "weigh"), [("softmax", "raw"), ("logits", "softmax")])
    def test_sensitivity_is_the_derivative_by_the_router(self, score, weigh):
        """In the last layer, here the only one, a router's bias acts on the target through its own token alone."""
        config = make_config(layers=1)
        router = RouterConfig(E, K, score=score, weigh=weigh, bias=True)
        block = replace(config.blocks[0], feed_forward=replace(config.blocks[0].feed_forward, router=router))
        lm = LM(noisy(replace(config, blocks=(block,)), 0, jnp.float64), word_tokenizer())
        found = explain(lm, PROMPT, target=AIM, rule=Plain()).feed_forward

        def value(expert: int, step: float) -> float:
            def shift(path: tuple, leaf: jax.Array) -> jax.Array:
                here = jax.tree_util.keystr(path).endswith("layers[0].feed_forward.router.bias")
                return leaf.at[expert].add(step) if here else leaf

            logits = LM(jax.tree_util.tree_map_with_path(shift, lm.decoder))(ROW)[0, AT]
            return float(logits[11] - logits[60])

        sensitivity = found.sensitivity()[0, -1, AT]
        for k, expert in enumerate(found.ids[-1, AT]):
            slope = (value(int(expert), STEP) - value(int(expert), -STEP)) / (2 * STEP)
            np.testing.assert_allclose(sensitivity[k], slope, rtol=1e-5, atol=1e-8)
            assert abs(slope) > 1e-4

    def test_drop_renormalise_of_a_single_expert(self):
        """No other can make up for it: the score is the relevance, and nothing is divided by zero."""
        found = ExpertRelevance(np.full((1, 1, 1, 1), 2.5), np.zeros((1, 1, 1), int), np.full((1, 1, 1), 0.4), E)
        assert found.drop_renormalise().item() == 2.5
        none = replace(found, ids=np.full((1, 1, 1), -1), weights=np.zeros((1, 1, 1)), slots=np.zeros((1, 1, 1, 1)))
        for score in (none.drop_renormalise(), none.advantage(), none.sensitivity(), none.by_expert()):
            assert not score.any()


# ---- a trained model ----------------------------------------------------------------------------------------------


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x.ravel())) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@cache
def trained(dtype: str = "float32") -> LM:
    return moejax.load("tiny-olmoe", dtype=dtype)


@cache
def windows(count: int = 8, length: int = 32) -> list[list[int]]:
    """Pieces of a text that will not change."""
    ids = trained().encode((Path(__file__).parents[2] / "LICENSE").read_text())
    return [ids[i * length : (i + 1) * length] for i in range(count)]


@cache
def last_logits() -> np.ndarray:
    return np.asarray(trained()(jnp.asarray(windows())))[:, -1]


@cache
def randomised(upper: int, draws: int = 4) -> list[LM]:
    """The head and the uppermost layers drawn anew, each matrix with its own standard deviation."""
    lm, rng = trained(), np.random.default_rng(0)
    parts = ["head", *(f"layers[{i}]" for i in reversed(range(lm.config.num_layers)))][: upper + 1]

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1 or not jax.tree_util.keystr(path).lstrip(".").startswith(tuple(parts)):
            return leaf
        return jnp.asarray(rng.normal(0, float(leaf.std()), leaf.shape), leaf.dtype)

    return [LM(jax.tree_util.tree_map_with_path(draw, lm.decoder), lm.tokenizer) for _ in range(draws)]


def read_windows(lm: LM, rule: str, rank: int = 0) -> list[tuple[np.ndarray, ExpertRelevance]]:
    """Relevance of tokens and experts of every window, for the token that the trained model predicts, or a worse."""
    tokens, best = jnp.asarray(windows()), jnp.asarray((-last_logits()).argsort(-1)[:, rank])[:, None, None]
    seeds = LogitSeeds.of(jnp.full((len(tokens), 1), tokens.shape[1] - 1), best, jnp.ones(best.shape))
    out = relevance(lm.flat, tokens, jnp.ones(tokens.shape, bool), seeds, Gates(), rule=RULES[rule])
    slots, ids, weights = (np.asarray(x) for x in (out.gates.slots, out.routes.ids, out.routes.weights))
    experts = [
        ExpertRelevance(slots[:, :, row], ids[:, row], weights[:, row], lm.config.num_experts)
        for row in range(len(tokens))
    ]
    return list(zip(np.asarray(out.gates.tokens)[0, 0], experts, strict=True))


@cache
def similarity(rule: str, upper: int) -> tuple[float, float]:
    """Rank correlation of sizes, of tokens and of experts, between the trained and randomised models."""
    tokens, experts, trained_ones = [], [], read_windows(trained(), rule)
    for other in randomised(upper):
        for (before, mine), (after, theirs) in zip(trained_ones, read_windows(other, rule), strict=True):
            tokens.append(rank_correlation(np.abs(before), np.abs(after)))
            # mean over routed tokens, of experts with any: sums follow how often an expert runs, whatever it does
            ran = (mine.by_expert("count") > 0) & (theirs.by_expert("count") > 0)
            experts.append(rank_correlation(*(np.abs(r.by_expert("mean"))[ran] for r in (mine, theirs))))
    return float(np.mean(tokens)), float(np.mean(experts))


class TestTrainedModel:
    def test_explains_the_weights(self):
        """Model parameter randomisation (Adebayo et al., arXiv 1810.03292), with this project's thresholds."""
        for upper, most in ((2, 0.5), (3, 0.3)):
            for ours, plain in zip(similarity("attnlrp", upper), similarity("plain", upper), strict=True):
                assert ours <= most
                assert ours <= abs(plain) + 0.15, "never flatter than gradient times input by more"

    @pytest.mark.slow
    def test_a_rule_that_explains_the_input_fails(self):
        """The proportional rule does not see the head: a test that it passed would show nothing."""
        assert similarity("proportional", 0)[0] > 0.9
        assert similarity("attnlrp", 0)[0] < 0.8

    @pytest.mark.slow
    def test_bfloat16_agrees(self):
        for (wide, mine), (narrow, theirs) in zip(
            *(read_windows(trained(dtype), "attnlrp") for dtype in ("float32", "bfloat16")), strict=True
        ):
            assert narrow.dtype == np.float32
            assert rank_correlation(wide, narrow) >= 0.99
            kept = (mine.ids[..., None] == theirs.ids[..., None, :]).any(-1)
            assert kept.mean() > 0.98

    def test_another_token_has_another_explanation(self):
        best = read_windows(trained(), "attnlrp")
        other = read_windows(trained(), "attnlrp", rank=len(last_logits()[0]) // 2)
        assert np.mean([rank_correlation(one, two) for (one, _), (two, _) in zip(best, other, strict=True)]) < 0.9
