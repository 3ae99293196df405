"""Values at nodes against transformers and numpy; edits of them, which change what they say and nothing else."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.compare import close
from tiny.decoders import LAYERS, PROMPT, C, D, E, F, H, K, V, make_lm, mixture_lm
from tiny.four_devices import single
from tiny.hugging_face import loaded, random_batch, torch_model

import moejax
from moejax import Edits, Gates, MoejaxError, PromptError
from moejax.models import record
from moejax.models.node_table import checked_edits

OTHER = [7, 80, 2, 96, 41, 33, 9]


@cache
def lm() -> moejax.LM:
    """A model in float32, of two layers."""
    return make_lm(layers=LAYERS)


@cache
def cached(other: bool = False) -> tuple[Any, dict[str, Any]]:
    """Logits and values at every node of the model of :func:`lm`."""
    return lm().run_with_cache(OTHER if other else PROMPT, names="*")


RARE = [pytest.param(family, marks=pytest.mark.slow) for family in ("olmoe", "mixtral", "jetmoe", "llama")]


@pytest.mark.parametrize("family", ["qwen3_moe", *RARE])
def test_streams_and_router_logits_are_those_of_transformers(family: str) -> None:
    import torch

    tokens, _ = random_batch(2, 9)
    ours, routed = loaded(family), family != "llama"
    options = {"output_router_logits": True} if routed else {}
    with torch.no_grad():
        theirs = torch_model(family)(torch.tensor(tokens), output_hidden_states=True, **options)
    _, values = ours.run_with_cache(tokens, names=["stream", "router_logits"] if routed else "stream")
    layers = ours.config.num_layers
    for i in range(layers):
        close(values[f"stream.{i}"], theirs.hidden_states[i].numpy(), 2e-5)
    # transformers' last is behind the final norm
    close(ours.decoder.norm(values[f"stream.{layers}"], moejax.rules.Reading()), theirs.hidden_states[-1].numpy(), 2e-5)
    if routed:
        found = [value for name, value in values.items() if name.startswith("router_logits")]
        want = [logits.numpy() for logits in theirs.router_logits]
        # JetMoE lists those of attention and feed-forward part in turn
        want = want[1::2] if family == "jetmoe" else want
        for mine, logits in zip(found, want, strict=True):
            close(mine.reshape(logits.shape), logits, 2e-5)


def test_values_of_a_mixture_are_those_of_numpy() -> None:
    _, values = cached()
    at = {name: np.asarray(values[f"{name}.1"], np.float64)[0] for name in moejax.rules.NODES if f"{name}.1" in values}
    block = lm().decoder.layers[1]
    experts, x = block.feed_forward.experts, at["feed_forward_norm"]
    logits = x @ np.asarray(block.feed_forward.router.weight, np.float64).T
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.argsort(-scores, axis=-1)[:, :K]
    np.testing.assert_array_equal(at["expert_ids"], ids)
    for name, want in (
        ("router_logits", logits),
        ("router_scores", scores),
        ("expert_weights", -np.sort(-scores)[:, :K]),
    ):
        np.testing.assert_allclose(at[name], want, rtol=1e-4, atol=1e-5)
    gate, up = np.moveaxis(np.asarray(experts.gate_up, np.float64)[ids] @ x[:, None, None, :, None], 2, 0)[..., 0]
    neurons = gate / (1 + np.exp(-gate)) * up
    outputs = np.einsum("tkof,tkf->tko", np.asarray(experts.down, np.float64)[ids], neurons)
    assert neurons.shape == (len(PROMPT), K, F)
    close(at["neurons"], neurons)
    close(at["expert_outputs"], outputs)
    close(at["feed_forward"], (at["expert_weights"][..., None] * outputs).sum(1))
    close(at["middle"] + at["feed_forward"], values["stream.2"][0])
    heads = at["heads"].reshape(len(PROMPT), H * C)
    close(heads @ np.asarray(block.attention.output.weight, np.float64).T, at["attention"])
    np.testing.assert_allclose(at["edges"].sum(-1), 1, rtol=1e-5)
    assert not np.triu(at["edges"], 1).any()


def edited_nodes(names: list[str]) -> list[str]:
    """Names of nodes that can be edited and whose neutral edits keep every bit."""
    kinds = moejax.rules.NODES
    return [n for n in names if kinds[n.rpartition(".")[0]].is_edited and not n.startswith("edges")]


def check_every_node(model: moejax.LM, row: np.ndarray) -> dict[str, Any]:
    """Assert that an edit at any one node has an effect, and edits that change no number have none.

    Returns the values at all nodes.
    """
    logits, values = model.run_with_cache(row, names="*")
    assert set(values) == set(moejax.nodes(model).names)
    names = edited_nodes(list(values))

    def run(factors: Any) -> Any:
        edits = Edits()
        for i, name in enumerate(names):
            # not all by one factor, which a norm or renormalised weights take away
            edits = edits.scale(name, 1 - factors[i] * jnp.linspace(0.2, 0.8, values[name].shape[-1]))
        return moejax.apply(model.decoder, jnp.asarray(row), edits=edits)[0]

    neutral, *several = jax.jit(jax.vmap(run))(jnp.eye(len(names) + 1, len(names), -1))
    close(neutral, logits)
    for name, changed in zip(names, several, strict=True):
        assert np.abs(changed - logits).max() > 1e-4, name
    return values


def test_edits_and_patches_that_change_no_number_change_no_bit() -> None:
    logits, values = cached()
    ones, whole = Edits(), Edits()
    for name in edited_nodes(list(values)):
        ones, whole = ones.scale(name, 1.0).add(name, 0.0, tokens=[2]), whole.patch(values, name)
    np.testing.assert_array_equal(lm()(PROMPT, edits=ones), logits)
    np.testing.assert_array_equal(lm()(PROMPT, edits=whole), logits)
    close(lm()(PROMPT, edits=Edits().patch(values, "edges")), logits)


def test_patched_streams_are_the_other_run() -> None:
    (logits, values), (theirs, other) = cached(), cached(other=True)
    np.testing.assert_array_equal(lm()(PROMPT, edits=Edits().patch(other, "stream.0")), theirs)
    np.testing.assert_array_equal(lm()(PROMPT, edits=Edits().patch(other, f"stream.{LAYERS}"))[0, -1], theirs[0, -1])
    # causal: what comes before the patched token stays as it was
    patched = lm()(PROMPT, edits=Edits().patch(other, ["stream.1"], tokens=[4]))
    np.testing.assert_array_equal(patched[:, :4], logits[:, :4])
    assert np.abs(patched[:, 4:] - logits[:, 4:]).max() > 1e-3
    _, seen = lm().run_with_cache(PROMPT, names="stream.1", edits=Edits().patch(other, ["stream.1"], tokens=[-3]))
    want = np.array(values["stream.1"])
    want[:, 4] = other["stream.1"][:, 4]
    np.testing.assert_array_equal(seen["stream.1"], want)


def test_edits_are_the_gates_that_say_the_same() -> None:
    config, row = lm().config, np.asarray([PROMPT])
    expert = int(cached()[1]["expert_ids.1"][0, 5, 0])
    gates = Gates.ones(config, row)
    by_gate = lm()(row, gates=gates.drop_expert(1, expert).drop_head(0, 2, token=3))
    by_edit = Edits().scale("expert_outputs.1", 0, experts=[expert]).scale("heads.0", 0, heads=[2], tokens=[3])
    close(lm()(row, edits=by_edit), by_gate, 1e-6)
    close(lm()(row, edits=Edits().set("stream.1", 0, tokens=[2])), lm()(row, gates=gates.drop_token(2, layer=1)), 1e-6)
    # every expert but the dropped one keeps its logits; the next best takes the place of the dropped one
    routed = lm()(row, edits=Edits().add("router_logits.1", -1e9, experts=[expert]))
    _, seen = lm().run_with_cache(row, names="*.1", edits=Edits().add("router_logits.1", -1e9, experts=[expert]))
    assert (np.asarray(cached()[1]["expert_ids.1"]) == expert).any()
    assert not (np.asarray(seen["expert_ids.1"]) == expert).any()
    assert np.abs(routed - cached()[0]).max() > 1e-3
    # logits raised far enough select the expert for every token
    _, seen = lm().run_with_cache(
        row, names="expert_ids.0", edits=Edits().add("router_logits.0", 99.0, experts=[E - 1])
    )
    assert (np.asarray(seen["expert_ids.0"])[..., 0] == E - 1).all()


def test_edges_are_edited_before_values_are_read() -> None:
    _, seen = lm().run_with_cache(PROMPT, names=["edges.0", "heads.0"], edits=Edits().scale("edges.0", 3.0, heads=[1]))
    plain = cached()[1]
    factor = np.array([1, 3, 1, 1])
    close(seen["edges.0"], plain["edges.0"] * factor[:, None, None])
    close(seen["heads.0"], plain["heads.0"] * factor[:, None])


def test_apply_under_jit_grad_and_vmap() -> None:
    decoder, row = lm().decoder, jnp.asarray([PROMPT])
    vector = jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
    names = ("neurons.1", "router_logits.0")

    def loss(decoder: Any, gates: Gates, edits: Edits) -> Any:
        logits, values = moejax.apply(decoder, row, gates=gates, edits=edits, names=names)
        return logits[0, -1, 5] + (values["neurons.1"] ** 2).sum() + values["router_logits.0"][0, 3, 2]

    edits = Edits().add("stream.1", 0.1 * vector, tokens=[4]).scale("expert_outputs.0", 0.7, experts=[1, 2])
    gates = Gates.ones(lm().config, row)
    value, (d_decoder, d_gates, d_edits) = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(decoder, gates, edits)
    assert np.isfinite(value)
    assert np.abs(d_decoder.layers[0].feed_forward.router.weight).max() > 0
    assert np.abs(d_gates.heads).max() > 0
    run = jax.jit(lambda step: loss(decoder, gates, edits.with_values(lambda v: v + step * jnp.ones_like(v))))
    step = 1e-2
    slope = (run(step) - run(-step)) / (2 * step)
    np.testing.assert_allclose(slope, sum(leaf.sum() for leaf in jax.tree.leaves(d_edits)), rtol=2e-2)

    def at(t):
        return moejax.apply(decoder, row, edits=Edits().set("stream.1", vector, tokens=t))[0]

    swept = jax.jit(jax.vmap(at))(jnp.arange(len(PROMPT)))
    close(swept[4], lm()(row, edits=Edits().set("stream.1", vector, tokens=[4])), 1e-6)


def test_without_edits_and_names_there_is_nothing_more_to_compute() -> None:
    decoder, row = lm().decoder, jnp.asarray([PROMPT])
    plain = jax.jit(lambda d, t: d(t)).lower(decoder, row).as_text()
    applied = jax.jit(lambda d, t: moejax.apply(d, t)[0]).lower(decoder, row).as_text()
    assert plain.replace("<lambda>", "") == applied.replace("<lambda>", "")


def test_registered_layers_have_the_same_nodes() -> None:
    check_every_node(single("moejax"), np.asarray([PROMPT]) % 80)


def test_attention_experts_and_shared_experts_have_nodes(x64: None) -> None:
    model = mixture_lm()
    values = check_every_node(model, np.asarray([PROMPT]))
    assert "router_logits.1" not in values, "the second layer is dense"
    assert values["shared.0"].shape == (1, len(PROMPT), 1, D)
    with pytest.raises(PromptError, match=r"no node 'router_logits\.1'.*do you mean"):
        model.run_with_cache(PROMPT, names=["router_logits.1"])


def test_padding_does_not_shift_tokens() -> None:
    padded = np.asarray([[1, 1, 1, *PROMPT], [*OTHER, *OTHER[:3]]])
    valid = np.ones(padded.shape, bool)
    valid[0, :3] = False
    edits = Edits().set("stream.1", 2.0, tokens=[4]).add("middle.0", 1.0, tokens=[-1])
    got = lm()(padded, valid=valid, edits=edits)
    close(got[0, 3:], lm()(PROMPT, edits=edits)[0])
    close(got[1], lm()(padded[1], edits=edits)[0])


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        (Edits().add("stream.9", 1), r"no node 'stream\.9'.*moejax\.nodes"),
        (Edits().add("shared.0", 1), "no node"),
        (Edits().add("stream.1", np.ones(7)), r"shape \[7\].*does not broadcast"),
        (Edits().add("stream.1", 1, tokens=[7]), r"tokens=\[7\].*-7 to 6"),
        (Edits().add("expert_outputs.0", 1, experts=[E]), r"experts=\[6\].*0 to 5"),
        (Edits().add("router_logits.0", np.ones(3), experts=[1, 2]), "does not broadcast"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edits: Any, says: str) -> None:
    with pytest.raises(MoejaxError, match=says):
        checked_edits(lm().config, edits, (1, len(PROMPT)))


def test_a_part_that_passes_no_such_node_is_named() -> None:
    class Silent(moejax.MoeLayer):
        def topk_expert(self, gate_logits: Any) -> Any:
            weights, ids = jax.lax.top_k(jax.nn.softmax(gate_logits), self.num_selected)
            return weights, ids, jax.nn.softmax(gate_logits)

    layer = Silent(4, 4, 3, 2)
    block = moejax.layers.Block(None, None, None, None, layer, None, None, moejax.layers.BlockConfig(None, None, 1e-5))

    def run(**options):
        return block(jnp.ones((1, 2, 4)), moejax.layers.Call(moejax.rules.Reading(**options)), None)

    assert run(names=("router_scores",))[2].nodes["router_scores"].shape == (1, 2, 3)
    with pytest.raises(MoejaxError, match="does not pass the node 'router_scores'"):
        run(edits=Edits().scale("router_scores", 2.0))


def test_nodes_are_listed() -> None:
    table = repr(moejax.nodes(lm()))
    assert "stream.0-2 " in table
    assert f"[B T K={K} F={F}]" in table
    assert moejax.nodes(lm().decoder).names == moejax.nodes(lm().config).names
    with pytest.raises(PromptError, match="do you mean 'router_logits"):
        lm().run_with_cache(PROMPT, names="router_logit")
    assert lm().run_with_cache([PROMPT, OTHER], names=["*.1"])[0].shape == (2, len(PROMPT), V)


def test_record_works_for_a_version_at_every_node() -> None:
    with pytest.warns(DeprecationWarning, match="moejax.apply"):
        values, stream = record(lm().decoder, jnp.asarray([PROMPT]), None, ["neurons.1", "edges.0"])
    np.testing.assert_array_equal(values["neurons.1"], cached()[1]["neurons.1"])
    assert values["edges.0"].shape == (1, H, len(PROMPT), len(PROMPT))
    np.testing.assert_array_equal(stream, cached()[1][f"stream.{LAYERS}"])
