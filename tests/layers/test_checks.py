"""Properties of every layer: copies compute what was copied, weights sum to one, empty routes cost nothing."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.layers import CASES, B, D, E, F, K, O, T, make, parameters, settings, tokens

from layers.reference import LIBMOE, PUBLISHED, gelu, mixture, over_sum, pick, relu, softmax, top
from moejax import get_moe
from moejax.layers import MLP, Activation, MLPConfig
from moejax.layers.feed_forward.experts import Experts
from moejax.rules import Reading

route = jax.jit(lambda layer, x: layer.topk_expert(layer.gate(x)))
run = jax.jit(lambda layer, x: layer(x, return_id_experts=True))


def dense(out: int = O, bias: bool = True, hidden: int = F) -> MLP:
    rng = np.random.default_rng(2)
    config = MLPConfig(D, hidden, Activation("gelu"), bias)
    shapes = [(1, hidden, D), (out, hidden), (1, hidden), (out,)]
    arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    return MLP(*arrays[:2], *(arrays[2:] if bias else (None, None)), config)


# ---- upcycling -----------------------------------------------------------------------------------------------------

EXACT = [
    ("smoe", None), ("smoe_sigmoidgating", None), ("xmoe", None), ("smoe", "libmoe"), ("smoe_sigmoidgating", "libmoe"),
    ("xmoe", "libmoe"), ("smoe_share", "libmoe"), ("smoe_sharev3", "libmoe"),
]  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "compat"), EXACT)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_copies_compute_what_was_copied(name, compat, bias):
    mlp, x = dense(bias=bias), jnp.asarray(tokens())
    y = jax.jit(lambda mlp, x: get_moe(name)(D, O, E, K, expert=mlp, args=settings(name, compat))(x)[0])(mlp, x)
    hidden = np.asarray(x) @ np.asarray(mlp.gate_up[0]).T + (
        0 if mlp.gate_up_bias is None else np.asarray(mlp.gate_up_bias)
    )
    want = gelu(hidden) @ np.asarray(mlp.down).T + (0 if mlp.down_bias is None else np.asarray(mlp.down_bias))
    np.testing.assert_allclose(y, want, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_shared_copies_stand_side_by_side():
    """Three shared experts held as one compute three times the copied layer."""
    mlp, shared = dense(), 3
    layer = get_moe("smoe_share")(D, O, E, K, expert=mlp, args={"num_shared": shared})
    x = jnp.asarray(tokens())
    np.testing.assert_allclose(layer.shared(x, Reading()), shared * mlp(x, Reading()), rtol=1e-12, atol=1e-12)


def test_experts_given_one_by_one_are_those():
    several = [jax.tree.map(lambda leaf, i=i: leaf + i, dense()) for i in range(E + 1)]
    layer = get_moe("smoe")(D, O, E, K, expert=several[:E])
    np.testing.assert_array_equal(layer.experts.down, np.stack([e.down for e in several[:E]]))
    layer = get_moe("smoe_share")(D, O, E, K, expert=several)
    np.testing.assert_array_equal(layer.experts.down, np.stack([e.down for e in several[:E]]))
    np.testing.assert_array_equal(layer.shared.mlp.down, several[E].down)


# ---- weights and losses --------------------------------------------------------------------------------------------

SUM_TO_ONE = [case for case in EXACT if case[0] != "xmoe" or case[1]]


@pytest.mark.parametrize(("name", "compat"), [*SUM_TO_ONE, ("xmoe", None), ("smoe_plus_plus", "libmoe")])
def test_weights_sum_to_one_under_bfloat16(name, compat):
    def half(leaf):
        return jnp.asarray(leaf, jnp.bfloat16)

    weights, _, _ = route(jax.tree.map(half, make(name, compat)), half(tokens()))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["smoe", "smoe_plus_plus"])
def test_bfloat16_is_near_float32(name):
    layer, x = make(name), jnp.asarray(tokens(), jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    back = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    (y, auxiliary, _, info), (want, loss, _, exact) = run(low, x), run(back, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert auxiliary.dtype == jnp.float32
    np.testing.assert_array_equal(info["selected_experts"], exact["selected_experts"])
    assert np.abs(y.astype(np.float32) - want).max() < 0.02 * np.abs(want).max()
    np.testing.assert_allclose(auxiliary, loss, rtol=1e-4)


@pytest.mark.parametrize("batch", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 8))])
@pytest.mark.parametrize(
    "name", ["smoe", "smoe_sigmoidgating", "xmoe", "smoe_share", "smoe_sharev3", "smoe_tcmoe", "smoe_plus_plus"]
)
@pytest.mark.parametrize("compat", [None, "libmoe"])
def test_balance_is_one_where_scores_are_even(name, compat, batch):
    """At any batch size, as long as the special experts of MoE++ weigh as much as the others; LibMoE's TC: B / E."""
    layer = make(name, compat, **({"tau": 1.0} if name == "smoe_plus_plus" else {}))
    routes = layer.counts.router_outputs
    # without expert 4, which LibMoE's MoE++ weighs differently, and without null routes
    ids = jnp.asarray(np.random.default_rng(batch).integers(0, 4, (batch, T, K)))
    found = layer.balanceloss(ids, jnp.full((batch, T, routes), 1 / routes))
    want = batch / E if name == "smoe_tcmoe" and compat else 1
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_diversity_of_equal_experts_is_one():
    layer = make("smoe")
    same = layer.replace(experts=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), layer.experts))
    ids, weights = jnp.asarray(np.tile(np.arange(K), (B, T, 1))), jnp.ones((B, T, K))
    both = jax.jit(lambda layer, x: layer.compute_moe(ids, weights, layer.zeros(x), x, None, True))
    x = jnp.asarray(tokens(), jnp.float32)
    np.testing.assert_allclose(both(same, x)[1], 1, rtol=1e-5)
    assert both(layer, x)[1] < 0.9
    # a slot that carries nothing has no output to compare
    weights = weights.at[..., 1].set(0)
    both = jax.jit(lambda layer, x: layer.compute_moe(ids, weights, layer.zeros(x), x, None, True))
    np.testing.assert_allclose(both(same, x)[1], 1, rtol=1e-5)


def test_outputs_that_are_known_already():
    layer, x = make("smoe"), jnp.asarray(tokens(), jnp.float32)
    ids, weights = jnp.asarray(np.tile([4, 0, 2], (B, T, 1))), jnp.asarray(np.tile([0.5, 0.2, 0.3], (B, T, 1)))
    p = parameters(layer)
    outputs = np.random.default_rng(0).normal(size=(E, B, T, O))
    run = jax.jit(lambda layer, *arrays: layer.compute_moe(*arrays))
    y = run(layer, ids, weights, jnp.ones((B, T, O)), x, jnp.asarray(outputs, jnp.float32))
    np.testing.assert_allclose(y, 1 + 0.5 * outputs[4] + 0.2 * outputs[0] + 0.3 * outputs[2], rtol=1e-5, atol=1e-5)
    y = run(layer, ids, weights, jnp.ones((B, T, O)), x)
    want = mixture(p, np.asarray(x, np.float64), np.asarray(ids), np.asarray(weights))
    np.testing.assert_allclose(y, 1 + want, rtol=1e-4, atol=1e-4)


def test_a_call_leaves_the_layer_as_it_was():
    layer, x = make("smoe"), jnp.asarray(tokens(), jnp.float32)
    before = {**vars(layer)}
    jax.jit(lambda x: layer(x))(x)
    assert vars(layer) == before
    assert layer.reading == Reading()


def test_info_is_detached_and_the_rest_is_not():
    layer, x = make("smoe"), jnp.asarray(tokens(), jnp.float32)

    def told(layer):
        return sum(v.sum() for v in layer(x, return_id_experts=True)[3].values())

    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(jax.jit(jax.grad(told))(layer)))
    auxiliary = jax.jit(jax.grad(lambda layer: layer(x)[1]))(layer)
    assert np.asarray(auxiliary.gate_weight).any()


# ---- slots that cost nothing ---------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function of (layer, x) that returns how many rows stand in each expert's buffer."""
    seen: list[Any] = []
    original = Experts.__call__

    def spying(self: Experts, x: Any, assignment: Any, reading: Any) -> Any:
        seen.append(assignment.group_sizes)
        return original(self, x, assignment, reading)

    monkeypatch.setattr(Experts, "__call__", spying)

    @jax.jit
    def found(layer: Any, x: jax.Array) -> jax.Array:
        layer.run(x)
        return seen.pop()

    return found


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "compat"), [case for case in CASES if case[0] in (
    "smoe", "smoe_tcmoe", "smoe_plus_plus", "remoe", "expert_choice"
)])  # fmt: skip
def test_routes_without_a_product_take_no_place(loads, name, compat):
    layer, x = make(name, compat), tokens()
    want = (LIBMOE if compat else PUBLISHED)[name](parameters(layer), x, K, np.ones((B, T), bool))
    rows = np.zeros(E, int)
    for ids, weights in zip(want.ids.reshape(B * T, -1), want.weights.reshape(B * T, -1), strict=True):
        if name == "smoe_tcmoe" and compat:
            winners = {i % E: i for i in ids.tolist()}
            taken = {e for e, i in winners.items() if i < 2 * E}
        elif name == "smoe_tcmoe":
            taken = {i % E for i in ids.tolist() if i < 2 * E}
        else:
            taken = {i for i, w in zip(ids.tolist(), weights, strict=True) if i < E and w != 0}
        for e in taken:
            rows[e] += 1
    if name != "smoe":
        assert rows.sum() < want.ids.size, "something carries nothing"
    np.testing.assert_array_equal(loads(layer, jnp.asarray(x)), rows)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factor", [0.5, 1.0, 40.0])
def test_capacity_drops_the_later_slots_and_counts_them(loads, factor):
    layer, x = make("smoe", capacity_factor=factor), tokens()
    p = parameters(layer)
    scores = softmax(x @ p["router.weight"].T)
    ids = top(scores, K)
    weights, room, dropped = over_sum(pick(scores, ids)), [math.ceil(factor * B * T * K / E)] * E, 0
    for b, t, k in np.ndindex(ids.shape):
        if room[ids[b, t, k]] > 0:
            room[ids[b, t, k]] -= 1
        else:
            weights[b, t, k], dropped = 0, dropped + 1
    y, _, _, info = run(layer, jnp.asarray(x))
    np.testing.assert_allclose(y, mixture(p, x, ids, weights), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(info["weights"], weights, rtol=1e-10)
    np.testing.assert_allclose(info["dropped"], dropped / ids.size, rtol=1e-6)
    assert (dropped > 0) == (factor <= 1)
    assert max(loads(layer, jnp.asarray(x))) <= math.ceil(factor * B * T * K / E)


@pytest.mark.usefixtures("x64")
def test_capacity_of_a_layer_with_any_number_of_slots(loads):
    """The fair share is that of K slots for a token, also where a token may take every expert."""
    layer, x = make("remoe", capacity_factor=0.5), jnp.asarray(tokens())
    found, whole = loads(layer, x), loads(make("remoe"), x)
    np.testing.assert_array_equal(found, np.minimum(whole, math.ceil(0.5 * B * T * K / E)))
    assert found.sum() < whole.sum()


# ---- smallest and largest sizes ------------------------------------------------------------------------------------

SIZES = [(D, D, 1, 1, 4), (D, D, E, E, 4), (D, D, E, K, 1)]


def possible(name: str, compat: str | None, experts: int, slots: int) -> bool:
    """LibMoE's shared expert takes one of the experts and one of the slots."""
    return not (compat and "share" in name and min(experts, slots) < 2)


@pytest.mark.parametrize(("d", "o", "experts", "slots", "count"), SIZES)
@pytest.mark.parametrize(
    ("name", "compat"),
    [case if case == ("smoe", None) else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_sizes(name, compat, d, o, experts, slots, count):
    if not possible(name, compat, experts, slots):
        return
    layer = make(
        name,
        compat,
        sizes=(d, o, experts, slots),
        **({} if name != "smoe_sharev3" else {"num_groups": 1, "num_selected_groups": 1}),
    )
    x = jnp.asarray(tokens(shape=(1, count, d)), jnp.float32)
    y, auxiliary, _, info = run(layer, x)
    assert y.shape == (1, count, o)
    assert np.isfinite(auxiliary)
    for value in jax.tree.leaves((y, info)):
        assert np.isfinite(np.asarray(value)).all()


def test_one_expert_is_that_expert():
    layer, x = make("smoe", sizes=(D, O, 1, 1)), tokens(shape=(1, 4, D))
    want = mixture(parameters(layer), x, np.zeros((1, 4, 1), int), np.ones((1, 4, 1)))
    np.testing.assert_allclose(run(layer, jnp.asarray(x, jnp.float32))[0], want, rtol=1e-4, atol=1e-4)


def test_relu_router_that_wants_nobody():
    """A token without any expert is zero, and nothing is not a number."""
    layer = make("remoe", sizes=(D, D, E, K))
    layer = layer.replace(gate_weight=-jnp.abs(layer.gate_weight))
    x = jnp.abs(jnp.asarray(tokens(), jnp.float32))
    y, auxiliary, _, info = run(layer, x)
    assert not y.any()
    assert np.isfinite(auxiliary)
    assert info["balance_loss"] == 0
    assert (relu(np.asarray(x) @ np.asarray(layer.gate_weight).T) == 0).all()
