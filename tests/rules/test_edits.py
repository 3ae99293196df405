"""Edits: how they select, as numpy writes it, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Edits, MoejaxError
from moejax.rules import NODES, Reading
from moejax.rules.edits import NOWHERE

pytestmark = pytest.mark.fast

B, T, D, K, R, H, S = 2, 5, 7, 3, 8, 4, 5
SIZES = {"B": B, "T": T, "D": D, "K": K, "R": R, "H": H, "S": S, "F": 6, "C": 9, "U": 1}
RNG = np.random.default_rng(0)
IDS = np.stack([RNG.permutation(R)[:K] for _ in range(B * T)]).reshape(B, T, K)


def value_at(node: str) -> np.ndarray:
    return RNG.normal(size=[SIZES[letter] for letter in NODES[node].axes]).astype(np.float32)


def apply(edits: Edits, node: str, x: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """The value behind the node of layer 2."""
    reading = Reading(edits=edits, positions=None if positions is None else jnp.asarray(positions)).for_layer(2)
    return np.asarray(reading.node(node, jnp.asarray(x), jnp.asarray(IDS)))


@pytest.mark.parametrize("data", [False, True], ids=["structure", "data"])
def test_values_broadcast_to_what_is_selected(data: bool) -> None:
    stream, heads, edges = value_at("stream"), value_at("heads"), value_at("edges")
    two, by_head = RNG.normal(size=(2, D)), RNG.normal(size=(2, 1))
    edits = (
        Edits()
        .set("stream.2", two, tokens=[3, 1])
        .scale("heads.2", by_head, heads=[2, 0], tokens=[-1])
        .add("edges.2", 1.0, heads=[1])
        .set("stream.1", 0.0)
    )
    edits = edits.as_data() if data else edits
    want = stream.copy()
    want[:, [3, 1]] = two
    np.testing.assert_array_equal(apply(edits, "stream", stream), want)
    want = heads.copy()
    want[:, -1, [2, 0]] *= by_head.astype(np.float32)
    np.testing.assert_allclose(apply(edits, "heads", heads), want, rtol=1e-6)
    want = edges.copy()
    want[:, 1] += 1
    np.testing.assert_array_equal(apply(edits, "edges", edges), want)


def test_experts_select_slots_by_id_and_router_outputs_by_number() -> None:
    outputs, logits = value_at("expert_outputs"), value_at("router_logits")
    vectors = RNG.normal(size=(2, D)).astype(np.float32)
    edits = Edits().set("expert_outputs.2", vectors, experts=[6, 1]).add("router_logits.2", [3.0, 4.0], experts=[6, 1])
    want = outputs.copy()
    want[IDS == 6], want[IDS == 1] = vectors
    np.testing.assert_array_equal(apply(edits, "expert_outputs", outputs), want)
    want = logits.copy()
    want[..., [6, 1]] += np.float32([3, 4])
    np.testing.assert_array_equal(apply(edits, "router_logits", logits), want)


def test_tokens_are_counted_without_padding() -> None:
    stream = value_at("stream")
    positions = np.array([[NOWHERE, NOWHERE, 0, 1, 2], [0, 1, 2, 3, 4]])
    edits = Edits().set("stream.2", [[[1.0]], [[2.0]]], tokens=[1]).add("stream.2", 5.0, tokens=[-1])
    want = stream.copy()
    want[0, 3], want[1, 1] = 1, 2
    want[:, 4] += 5
    np.testing.assert_array_equal(apply(edits, "stream", stream, positions), want)


def test_patches_follow_experts_to_their_slots() -> None:
    theirs, ours = value_at("expert_outputs"), value_at("expert_outputs")
    ids = np.stack([RNG.permutation(R)[:K] for _ in range(B * T)]).reshape(B, T, K)
    cache = {"expert_outputs.2": jnp.asarray(theirs), "expert_ids.2": jnp.asarray(ids)}
    edits = Edits().patch(cache, "expert_outputs", experts=range(R), tokens=[1, -2])
    got = apply(edits, "expert_outputs", ours)
    for b in range(B):
        for t in range(T):
            for k in range(K):
                there = np.flatnonzero(ids[b, t] == IDS[b, t, k])
                want = theirs[b, t, there[0]] if there.size else np.zeros(D)
                np.testing.assert_array_equal(got[b, t, k], want if t in (1, T - 2) else ours[b, t, k])
    with pytest.raises(MoejaxError, match=r"read expert_ids\.2 into the cache"):
        Edits().patch({"expert_outputs.2": theirs}, experts=[1])


def test_half_precision_is_rounded_once() -> None:
    x = jnp.asarray(value_at("stream"), jnp.bfloat16)

    def cut(edits):
        return Reading(edits=edits).for_layer(2).node("stream", x)

    assert cut(Edits().scale("stream.2", 1.0)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(cut(Edits().scale("stream.2", 1.0).add("stream.2", 0.0)), x)
    np.testing.assert_array_equal(cut(Edits().set("stream.2", x.astype(jnp.float32))), x)


def test_edits_are_a_pytree_whose_structure_is_where_they_are() -> None:
    edits = Edits().add("stream.2", jnp.ones(D), tokens=[3]).scale("heads.1", 2.0, heads=jnp.array([1]))
    leaves, tree = jax.tree.flatten(edits)
    assert [leaf.dtype.kind for leaf in leaves] == ["f", "f", "i"]
    assert tree == jax.tree.structure(Edits().add("stream.2", 0.0, tokens=[3]).scale("heads.1", 1, heads=leaves[2]))
    assert tree != jax.tree.structure(Edits().add("stream.2", 0.0, tokens=[4]).scale("heads.1", 1, heads=leaves[2]))
    assert "add stream.2[tokens=[3]]" in repr(edits)
    x = jnp.asarray(value_at("stream"))

    def at(t):
        return Reading(edits=Edits().set("stream.2", 0.0, tokens=t)).for_layer(2).node("stream", x)

    swept = jax.vmap(at)(jnp.arange(T))
    np.testing.assert_array_equal(swept[3], at(jnp.array(3)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Edits().set("strem.3", 0), "no node 'strem.3'"),
        (lambda: Edits().set("expert_ids.3", 0), "edit router_logits instead"),
        (lambda: Edits().set("stream.3", 0, experts=[1]), r"whose value is \[B T D\]"),
        (lambda: Edits().set("stream.3", 0, token=[1]), "not by 'token'"),
        (lambda: Edits().set("stream.3", 0, tokens=[1.5]), "whole number"),
        (lambda: Edits().set("stream.3", 0, tokens=jnp.ones(2)), "whole numbers"),
        (lambda: Edits().patch({"stream.0": np.ones((1, T, D))}, "middle"), "it has stream.0"),
        (lambda: Edits().patch({"stream.0": np.ones((1, T, D))}, tokens=[T]), "of the cache has 5"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, says: str) -> None:
    with pytest.raises(MoejaxError, match=says):
        make()


def test_the_earlier_name_of_a_node_works() -> None:
    x, tap = jnp.asarray(value_at("stream")), {"middle": jnp.full((B, T, D), 2.0), "stream": jnp.full((B, T, D), 3.0)}
    with pytest.warns(DeprecationWarning, match="Reading.node"):
        np.testing.assert_array_equal(Reading(taps=tap).tap("middle", x), 2 * x)
    reading = Reading(taps=tap)
    with pytest.warns(DeprecationWarning, match="Reading.node"):
        np.testing.assert_array_equal(reading.tap("stream", reading.gate("tokens", x)), 3 * x)
