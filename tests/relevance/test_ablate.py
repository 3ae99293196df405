"""Interventions by the batch: each equals a forward pass without that part, written out in numpy or in the weights."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, ROW, C, D, E, F, G, H, L, T, V, make_lm, mixture_lm, noisy
from tiny.tokenizers import word_tokenizer

from moejax import LM, Argmax, Contrast, Direction, Gates, LogProbability, MoejaxError, Span, Token, ablate, explain
from moejax.models import family
from moejax.relevance import Cell, integrated_gradients
from moejax.routing import SCORES, WEIGHTS, route
from moejax.rules import Plain, Reading
from relevance.reference import Edits, Reference

K = 3
"""Of two experts that share a weight, dropping one says little of how the others share."""
SIZES = (D, F, E, K, H, G, C)
LAYERS = 2
EXACT = {"rtol": 1e-10, "atol": 1e-11}
AIM = Contrast(11, 60, 5)

pytestmark = pytest.mark.usefixtures("x64")


@cache
def toy(weigh: str = "raw", **options) -> LM:
    return make_lm(0, "float64", layers=LAYERS, weigh=weigh, sizes=SIZES, **options)


def run(lm: LM, **edits) -> Reference:
    """The forward pass without what ``edits`` name."""
    return Reference(lm.decoder, PROMPT, lm.config.blocks[0].rotary.rope.angles(jnp.arange(T)[None], C), Edits(**edits))


def reference(lm: LM, **edits) -> np.ndarray:
    return run(lm, **edits).logits


def change(lm: LM, **edits) -> float:
    """Of :data:`AIM`."""
    gone = reference(lm)[5] - reference(lm, **edits)[5]
    return gone[11] - gone[60]


def where(token: int | None) -> range | list[int]:
    return range(T) if token is None else [token]


class TestExperts:
    @pytest.mark.parametrize("weigh", ["raw", "renormalised"])
    @pytest.mark.parametrize(
        ("how", "edit"), [("zero", "experts"), ("renormalise", "renormalised"), ("replace", "replaced")]
    )
    def test_equals_recomputation(self, weigh, how, edit):
        lm = toy(weigh)
        cells = [Cell.expert(layer, e, token) for layer in range(LAYERS) for e in range(E) for token in (4, None)]
        got = ablate(lm, PROMPT, cells=cells, target=AIM, how=how)
        edits = [{edit: {(c.layer, t, c.index) for t in where(c.position)}} for c in cells]
        assert got.dtype == np.float64
        np.testing.assert_allclose(got[:, 0], [change(lm, **e) for e in edits], **EXACT)
        assert (np.abs(got) > 1e-3).sum() >= 2 * K

    def test_ways_differ(self):
        lm = toy()
        cells = Cell.routed(explain(lm, PROMPT, target=AIM))
        zero, shared, replaced = (
            ablate(lm, PROMPT, cells=cells, target=AIM, how=h, chunk=32) for h in ("zero", "renormalise", "replace")
        )
        assert len(cells) == LAYERS * T * K
        for one, other in ((zero, shared), (zero, replaced), (shared, replaced)):
            assert np.abs(one - other).max() > 0.01

    def test_every_expert_of_a_token(self):
        """None is left to make up for the others, or to take their place: those that must run are the best."""
        lm = toy()
        ids = explain(lm, PROMPT, target=AIM).expert_ids[1, 4]
        together = [Cell.expert(1, int(e), 4) for e in ids]
        zero, shared = (ablate(lm, PROMPT, cells=[together], target=AIM, how=how) for how in ("zero", "renormalise"))
        np.testing.assert_allclose(shared, zero, **EXACT)
        edit = {(1, 4, int(e)) for e in ids}
        got = ablate(lm, PROMPT, cells=[together], target=AIM, how="replace")
        np.testing.assert_allclose(got, [[change(lm, replaced=edit)]], **EXACT)

    def test_first_order_of_dropping_and_renormalising(self):
        """``drop_renormalise`` times what is left of the weights is the derivative by the share's gate."""
        lm, step = toy(), 1e-5
        read = explain(lm, PROMPT, target=AIM, rule=Plain()).feed_forward
        cells = [(layer, t, k) for layer in range(LAYERS) for t in (2, 5) for k in range(K)]
        gates = np.ones((LAYERS, 2 * len(cells), T, E))
        for row, (layer, t, k) in enumerate(cells):
            gates[layer, [2 * row, 2 * row + 1], t, read.ids[layer, t, k]] += [step, -step]
        logits = np.asarray(lm(jnp.tile(ROW, (2 * len(cells), 1)), gates=Gates(routing_weights=jnp.asarray(gates))))[
            :, 5
        ]
        values = logits[:, 11] - logits[:, 60]
        share = read.weights / read.weights.sum(-1, keepdims=True)
        want = np.array([(read.drop_renormalise()[0] * (1 - share))[cell] for cell in cells])
        np.testing.assert_allclose((values[::2] - values[1::2]) / (2 * step), want, rtol=1e-5, atol=1e-7)
        assert np.abs(want).max() > 0.01

    def test_explained_with_another_expert(self):
        """Gates on the routing hold during ``explain``, whose ledger closes."""
        lm = toy()
        intact = explain(lm, PROMPT, target=AIM)
        best = int(intact.expert_ids[1, 4, 0])
        ones = Gates.ones(lm.config, ROW)
        for how in ("replace", "renormalise"):
            read = explain(lm, PROMPT, target=AIM, gates=ones.drop_expert(1, best, 4, how=how))
            np.testing.assert_allclose(read.ledger.residual, 0, atol=1e-12)
            weight = np.where(read.expert_ids[1, 4] == best, read.expert_weights[1, 4], 0).sum()
            assert weight == 0
            assert (best in read.expert_ids[1, 4]) == (how == "renormalise")
            if how == "renormalise":
                np.testing.assert_allclose(read.expert_weights.sum(-1), intact.expert_weights.sum(-1), rtol=1e-12)


class TestCells:
    def test_every_kind_equals_its_gate(self):
        lm = toy(bias=True)
        ones, made = Gates.ones(lm.config, ROW), {}
        for token in (4, None):
            made |= {
                Cell.expert(1, 4, token): ones.drop_expert(1, 4, token),
                Cell.head(0, 3, token): ones.drop_head(0, 3, token),
                Cell.attention(1, token): ones.drop_attention(1, token),
                Cell.feed_forward(0, token): ones.drop_feed_forward(0, token),
            }
        made |= {Cell.token(2): ones.drop_token(2), Cell.token(5, LAYERS): ones.drop_token(5, LAYERS)}
        intact = np.asarray(lm(ROW, gates=ones))[0, 5]
        want = [(intact - np.asarray(lm(ROW, gates=gates))[0, 5])[[11, 60]] @ [1, -1] for gates in made.values()]
        got = ablate(lm, PROMPT, cells=list(made), target=AIM)[:, 0]
        np.testing.assert_allclose(got, want, **EXACT)
        assert (np.abs(got) > 1e-4).sum() >= 8

    def test_parts_of_a_layer(self):
        lm, every = toy(), [(1, t) for t in range(T)]
        got = ablate(lm, PROMPT, cells=[Cell.attention(1), Cell.feed_forward(1), Cell.attention(1, 4)], target=AIM)

        def heads(tokens):
            return {(1, t, h) for t in tokens for h in range(H)}

        experts = {(*at, e) for at in every for e in range(E)}
        want = [change(lm, heads=heads(range(T))), change(lm, experts=experts), change(lm, heads=heads([4]))]
        np.testing.assert_allclose(got[:, 0], want, **EXACT)

    def test_several_at_once_and_none(self):
        lm = toy()
        together = [Cell.expert(1, 3), Cell.head(0, 2, 5), Cell.token(1), Cell.expert(0, 2, -1)]
        got = ablate(lm, PROMPT, cells=[together, [], Cell.token(1)], target=AIM)[:, 0]
        experts = {(1, t, 3) for t in range(T)} | {(0, T - 1, 2)}
        np.testing.assert_allclose(got[0], change(lm, experts=experts, heads={(0, 5, 2)}, tokens={(0, 1)}), **EXACT)
        assert got[1] == 0, "exactly"
        np.testing.assert_allclose(got[2], change(lm, tokens={(0, 1)}), **EXACT)

    def test_chunks_and_single_calls_change_nothing(self):
        lm = toy()
        cells = [
            Cell.head(0, 1),
            Cell.expert(1, 2),
            [Cell.token(3), Cell.token(4)],
            Cell.expert(0, 1, 2),
            Cell.attention(1),
        ]
        whole = ablate(lm, PROMPT, cells=cells, target=AIM)
        np.testing.assert_allclose(ablate(lm, PROMPT, cells=cells, target=AIM, chunk=2), whole, **EXACT)
        np.testing.assert_allclose(ablate(lm, PROMPT, cells=[cells[2]], target=AIM)[0], whole[2], **EXACT)

    def test_no_cells(self):
        assert ablate(toy(), PROMPT, cells=[], target=AIM).shape == (0, 1)

    def test_under_other_interventions(self):
        lm = toy()
        gates = Gates.ones(lm.config, ROW).drop_head(0, 2)
        got = ablate(lm, PROMPT, cells=[Cell.expert(1, 3)], target=AIM, gates=gates)[0, 0]
        off = {(0, t, 2) for t in range(T)}
        both = change(lm, heads=off, experts={(1, t, 3) for t in range(T)})
        np.testing.assert_allclose(got, both - change(lm, heads=off), **EXACT)


class TestTargets:
    """The intervention in all of these: the fourth token's embedding is gone."""

    CELLS = (Cell.token(3),)

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        return reference(toy()), reference(toy(), tokens={(0, 3)})

    def test_best_token_is_that_of_the_intact_pass(self):
        before, after = self.logits()
        best = before.argmax(-1)
        position = int(np.flatnonzero(best != after.argmax(-1))[0])
        got = ablate(toy(), PROMPT, cells=self.CELLS, target=Argmax(position))
        np.testing.assert_allclose(got, [[(before - after)[position, best[position]]]], **EXACT)

    def test_probabilities(self):
        before, after = (np.asarray(jax.nn.log_softmax(x)) for x in self.logits())
        got = ablate(toy(), PROMPT, cells=self.CELLS, target=LogProbability(11, 5))
        np.testing.assert_allclose(got, [[(before - after)[5, 11]]], **EXACT)
        rivals = [60, 3, 8]
        odds = [x[5, 11] - np.log(np.exp(x[5, rivals]).sum()) for x in (before, after)]
        got = ablate(toy(), PROMPT, cells=self.CELLS, target=Contrast(11, rivals, 5))
        np.testing.assert_allclose(got, [[odds[0] - odds[1]]], **EXACT)

    def test_answers(self):
        """A span is one target, the log-probability of the whole."""
        before, after = (np.asarray(jax.nn.log_softmax(x)) for x in self.logits())
        answer = [PROMPT[5], PROMPT[6], 9]
        got = ablate(toy(), PROMPT[:5], cells=self.CELLS, target=Span(answer))
        np.testing.assert_allclose(got, [[(before - after)[[4, 5, 6], answer].sum()]], **EXACT)

    def test_streams(self):
        lm = toy()
        got = ablate(lm, PROMPT, cells=[Cell.token(3), Cell.token(3, 1)], target=Direction(np.eye(D)[7], 1, 3))
        entering = [run(lm, **edits).layers[1].x[3, 7] for edits in ({}, {"tokens": {(0, 3)}})]
        np.testing.assert_allclose(got[0], entering[0] - entering[1], **EXACT)
        np.testing.assert_allclose(got[1], entering[0], **EXACT, err_msg="as the layer reads it, after its gate")


def edited(lm: LM, **leaves) -> LM:
    """With leaves, named by their path's end, put through a function."""

    def edit(path: tuple, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return next((f(leaf) for end, f in leaves.items() if name.endswith(end.replace("__", "."))), leaf)

    return LM(jax.tree_util.tree_map_with_path(edit, lm.decoder), lm.tokenizer, "edited")


class TestOtherMixtures:
    def test_routing_of_attention_experts(self):
        """Weights are a softmax over the selected, so that an expert is excluded by a bias of minus infinity."""
        lm = mixture_lm()
        parts = [("layers[0].attention", Cell.attention_expert, 0), ("layers[0].feed_forward", Cell.expert, 0)]
        parts.append(("layers[1].attention", Cell.attention_expert, 1))
        cells = [make(layer, e) for _, make, layer in parts for e in range(3)]
        got = ablate(lm, PROMPT, cells=cells, target=AIM, how="replace").reshape(3, 3)
        for (path, _, _), row in zip(parts, got, strict=True):
            without = [edited(lm, **{f"{path}.router.bias": lambda b, e=e: b.at[e].set(-1e9)}) for e in range(3)]
            gone = [np.asarray(lm(ROW) - other(ROW))[0, 5] for other in without]
            np.testing.assert_allclose(row, [g[11] - g[60] for g in gone], **EXACT)
            assert np.abs(row).max() > 1e-3

    def test_weights_of_attention_experts(self):
        """All but one dropped, that one has all the weight, as if it had been selected alone."""
        lm = mixture_lm()
        others = [Cell.attention_expert(0, e) for e in range(E) if e != 2]
        ones = Gates.ones(lm.config, ROW)
        for cell in others:
            ones = ones.drop_attention_expert(cell.layer, cell.index, how="renormalise")
        got = ablate(lm, PROMPT, cells=[others], target=AIM, how="renormalise")[0, 0]
        gone = np.asarray(lm(ROW) - lm(ROW, gates=ones))[0, 5]
        np.testing.assert_allclose(got, gone[11] - gone[60], **EXACT)
        hidden = jax.jit(lambda decoder: decoder.hidden(ROW, reading=Reading(gates=ones)))(lm.decoder)
        routing = hidden.routing("attention")[0]
        alone = np.asarray(routing.ids) == 2
        assert alone.any()
        np.testing.assert_allclose(routing.weights, alone, rtol=1e-12)

    def test_shared_expert(self):
        lm = mixture_lm()
        got = ablate(lm, PROMPT, cells=[Cell.shared(0), Cell.shared(0, 4)], target=AIM)[:, 0]
        without = edited(lm, **{"layers[0].feed_forward.shared.mlp.down": jnp.zeros_like})
        gone = np.asarray(lm(ROW) - without(ROW))[0, 5]
        np.testing.assert_allclose(got[0], gone[11] - gone[60], **EXACT)
        gates = Gates.ones(lm.config, ROW).drop_shared(0, 4)
        gone = np.asarray(lm(ROW) - lm(ROW, gates=gates))[0, 5]
        np.testing.assert_allclose(got[1], gone[11] - gone[60], **EXACT)

    def test_registered_layer(self):
        """Without an expert is with its matrix at zero, and so without the shared one."""
        fields = {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2}
        fields |= {"num_attention_heads": H, "num_key_value_heads": G, "num_experts": E, "num_experts_per_tok": K}
        config = family("moejax").config(fields | {"moe": "smoe_share", "moe_layers": [0]})
        lm = LM(noisy(config, 0, jnp.float64), word_tokenizer(), "registered")
        routing = lm.decoder.hidden(jnp.asarray(ROW)).routing()[0]
        expert = int(routing.ids[0, 2, 0])
        cells = [Cell.expert(0, expert), Cell.shared(0), Cell.expert(0, expert, 2)]
        got = ablate(lm, PROMPT, cells=cells, target=AIM)[:, 0]
        without = [
            edited(lm, **{"layers[0].feed_forward.experts.down": lambda w: w.at[expert].set(0)}),
            edited(lm, **{"layers[0].feed_forward.shared.mlp.down": jnp.zeros_like}),
        ]
        gone = [np.asarray(lm(ROW) - other(ROW))[0, 5] for other in without]
        np.testing.assert_allclose(got[:2], [g[11] - g[60] for g in gone], **EXACT)
        assert np.abs(got).min() > 1e-6
        with pytest.raises(MoejaxError, match="layer 1 has no experts"):
            ablate(lm, PROMPT, cells=[Cell.expert(1, 0)])

    @pytest.mark.parametrize(
        ("cell", "message"),
        [
            (Cell.expert(1, 0), "layer 1 has no experts"),
            (Cell.shared(1), "layer 1 has no shared expert"),
        ],
    )
    def test_dense_layer(self, cell, message):
        with pytest.raises(MoejaxError, match=message):
            ablate(mixture_lm(), PROMPT, cells=[cell])


class TestRoute:
    @pytest.mark.parametrize(
        ("score", "weigh"), [("softmax", "raw"), ("softmax", "renormalised"), ("logits", "softmax")]
    )
    def test_choices_and_shares(self, score, weigh):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, E)))
        algebra = {"score": SCORES[score], "weigh": WEIGHTS[weigh]}
        plain, wide = route(logits, K, **algebra), route(logits, K + 1, **algebra)
        out = jnp.ones((5, E)).at[jnp.arange(5), plain.ids[:, 1]].set(0)
        replaced = route(logits, K, selectable=out, **algebra)
        np.testing.assert_array_equal(replaced.ids, np.asarray(wide.ids)[:, [0, 2, 3]])
        scores = jnp.take_along_axis(plain.scores, replaced.ids, axis=-1)
        np.testing.assert_allclose(replaced.weights, WEIGHTS[weigh](scores), rtol=1e-12)
        np.testing.assert_array_equal(replaced.scores, plain.scores)
        shared = route(logits, K, weight_factors=out, **algebra)
        np.testing.assert_array_equal(shared.ids, plain.ids)
        assert not np.asarray(shared.weights[:, 1]).any()
        np.testing.assert_allclose(shared.weights.sum(-1), plain.weights.sum(-1), rtol=1e-12)
        np.testing.assert_allclose(
            shared.weights[:, 0] / shared.weights[:, 2], plain.weights[:, 0] / plain.weights[:, 2]
        )

    def test_closed_after_groups_that_are_left_out(self):
        """Which come first where too few are left in the groups that a token may choose from."""
        logits = jnp.asarray([[3.0, 2.0, 1.0, 0.5]])

        def adjust(scores):
            return jnp.where(jnp.arange(4) < 2, scores, -jnp.inf)

        found = route(
            logits,
            2,
            score=SCORES["softmax"],
            weigh=WEIGHTS["raw"],
            adjust=adjust,
            selectable=jnp.array([[0.0, 1, 1, 1]]),
        )
        np.testing.assert_array_equal(found.ids, [[1, 2]])


class TestErrors:
    @pytest.mark.parametrize(
        ("cell", "error", "message"),
        [
            (Cell.expert(LAYERS, 0), IndexError, "layer 2 is out of range: there are 2"),
            (Cell.expert(0, E), IndexError, "expert 6 is out of range: there are 6"),
            (Cell.expert(0, 0, T), IndexError, "token 7 is out of range: there are 7"),
            (Cell.head(0, H), IndexError, "head 4 is out of range: there are 4"),
            (Cell.token(0, LAYERS + 1), IndexError, "layer 3 is out of range: there are 3"),
            (Cell.token(-T - 1), IndexError, "token -8"),
            (Cell.attention_expert(0, 0), MoejaxError, "layer 0 has no attention experts"),
            (Cell.shared(0), MoejaxError, "layer 0 has no shared expert"),
        ],
    )
    def test_cells_outside_the_model(self, cell, error, message):
        with pytest.raises(error, match=message):
            ablate(toy(), PROMPT, cells=[Cell.token(0), cell])

    def test_unknown_way(self):
        with pytest.raises(MoejaxError, match="how='drop' is unknown; choose from zero, renormalise, replace"):
            ablate(toy(), PROMPT, cells=[Cell.expert(0, 0)], how="drop")
        with pytest.raises(MoejaxError, match="how='drop' is unknown"):
            Gates.ones(toy().config, ROW).drop_expert(0, 0, how="drop")

    def test_nobody_left(self):
        lm = make_lm(layers=1, sizes=(D, F, 3, 3, H, G, C))
        with pytest.raises(MoejaxError, match="token 0 has 3 slots for the 3 experts of layer 0; with 1 switched off"):
            ablate(lm, PROMPT, cells=[Cell.expert(0, 0)], how="replace")
        for one in (None, 4):
            together = [Cell.expert(0, e, 4 if e else one) for e in range(E - K + 1)]
            with pytest.raises(MoejaxError, match=f"token 4 .* 3 slots for the 6 experts of layer 0; with {E - K + 1}"):
                ablate(toy(), PROMPT, cells=[together], how="replace")
            # one fewer, or as many of two layers, may go
            apart = [*together[1:], Cell.expert(1, 0, 4)]
            assert ablate(toy(), PROMPT, cells=[apart], how="replace").shape == (1, 1)

    @pytest.mark.parametrize("chunk", [0, -1])
    def test_chunk(self, chunk):
        for run in (explain, partial(ablate, cells=[Cell.expert(0, 0)]), integrated_gradients):
            with pytest.raises(MoejaxError, match=f"chunk={chunk} must be positive"):
                run(toy(), PROMPT, chunk=chunk)
        with pytest.raises(MoejaxError, match="outside the vocabulary"):
            ablate(toy(), PROMPT, cells=[Cell.token(0)], target=Token(V))

    def test_gates_of_another_model(self):
        lm, ones = toy(), Gates.ones(toy().config, ROW)
        other = ones.drop_expert(0, 0, how="replace").drop_attention(1)
        assert other.check(lm.config, ROW) is other
        wrong = replace(other, selectable=other.selectable[..., 1:]), replace(other, attention=jnp.ones((L, 1, T)))
        for gates, name in zip(wrong, ("selectable", "attention"), strict=True):
            with pytest.raises(MoejaxError, match=f"gates on {name} of shape"):
                ablate(lm, PROMPT, cells=[Cell.token(0)], gates=gates)
        gates = Gates(attention_routing_weights=jnp.ones((LAYERS, 1, T, E)))
        with pytest.raises(MoejaxError, match="gates on attention_routing_weights: this model has none"):
            ablate(lm, PROMPT, cells=[Cell.token(0)], gates=gates)
