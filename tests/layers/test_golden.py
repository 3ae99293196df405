"""Every variant against independent numpy, in double precision, and its gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.layers import CASES, B, D, E, K, O, T, built_in, call, make, objective, parameters, some_mask, tokens

from layers.reference import LIBMOE, PUBLISHED, Found, expert, smoe_plus_plus
from moejax.layers import Call

pytestmark = pytest.mark.usefixtures("x64")
every_case = pytest.mark.parametrize(("name", "compat"), CASES)


def expected(name: str, compat: str | None, layer, x: np.ndarray, mask: np.ndarray) -> Found:
    return (LIBMOE if compat else PUBLISHED)[name](parameters(layer), x, K, mask)


def test_no_variant_is_forgotten():
    assert set(built_in()) == set(PUBLISHED)
    assert {name for name, _ in CASES} == set(PUBLISHED)


def check(found, want: Found) -> None:
    output, auxiliary, nothing, info = found
    assert nothing is None
    np.testing.assert_allclose(output, want.output, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(auxiliary, want.auxiliary, rtol=1e-10)
    np.testing.assert_allclose(info["balance_loss"], want.balance, rtol=1e-10)
    np.testing.assert_allclose(info["router_z_loss"], want.z, rtol=1e-10)
    np.testing.assert_allclose(info["gate_softmax"], want.scores, rtol=1e-10, atol=1e-12)


@every_case
def test_against_numpy(name, compat):
    layer, x = make(name, compat), tokens()
    found, want = call(layer, x), expected(name, compat, layer, x, np.ones((B, T), bool))
    check(found, want)
    info = found[3]
    if name == "smoe_tcmoe":
        routes, ids = want.ids, np.asarray(info["selected_experts"])
        np.testing.assert_array_equal(ids, np.where(routes < 2 * E, routes % E, routes - E))
    else:
        np.testing.assert_array_equal(info["selected_experts"], want.ids)
        np.testing.assert_allclose(info["weights"], want.weights, rtol=1e-10, atol=1e-12)
        best = np.sort(want.weights, -1)
        margin = best[..., -1] - best[..., -2]
        np.testing.assert_allclose(info["router_magine"], margin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_masked_against_numpy(name):
    layer, x, mask = make(name), tokens(), some_mask()
    check(call(layer, x, mask), expected(name, None, layer, x, mask))


@every_case
def test_gradients_by_finite_differences(name, compat):
    """Gradients of the output and of the auxiliary loss, along a random direction in tokens and in each parameter."""
    layer, x = make(name, compat), jnp.asarray(tokens())
    rng, h = np.random.default_rng(5), 1e-6
    rest = jnp.asarray(rng.normal(size=(B, T, layer.out_embed_dim))), jnp.ones((B, T), bool)
    gradients = objective(layer, x, *rest)[2]
    leaves, tree = jax.tree_util.tree_flatten_with_path((layer, x))
    for i, ((path, leaf), slopes) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):
        where = jax.tree_util.keystr(path)
        if any(state in where for state in ("selection_bias", "log_l1")):
            assert not np.asarray(slopes).any(), f"{where} is moved between steps, not by the gradient"
            continue
        direction, ends = rng.normal(size=leaf.shape), []
        for sign in (1, -1):
            moved = [other + sign * h * direction if i == j else other for j, (_, other) in enumerate(leaves)]
            ends.append(np.asarray(objective(*tree.unflatten(moved), *rest)[0]))
        found = (np.asarray(slopes) * direction).reshape(2, -1).sum(-1)
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / (2 * h), rtol=2e-6, atol=2e-7, err_msg=where)
        unused = (compat == "libmoe" and "log_temperature" in where) or "gate_residual" in where
        assert unused or np.asarray(slopes[0]).any(), f"{where} learns from the task"
        if "router.weight" in where:
            assert np.asarray(slopes[1]).any(), f"{where} learns from the auxiliary loss"


@every_case
def test_masked_tokens_change_no_loss(name, compat):
    """Masked tokens change no auxiliary gradient either, and an expert that chooses tokens does not choose them."""
    layer, x, mask = make(name, compat), tokens(), some_mask()
    other = np.where(mask[..., None], x, 5 * tokens(9))
    one, two = (call(layer, rows, mask) for rows in (x, other))
    np.testing.assert_allclose(one[1], two[1], rtol=1e-13)
    for part in ("balance_loss", "router_z_loss"):
        np.testing.assert_allclose(one[3][part], two[3][part], rtol=1e-13)
    np.testing.assert_allclose(np.asarray(one[0])[mask], np.asarray(two[0])[mask], rtol=1e-12, atol=1e-12)
    of_layer, of_x = objective(layer, x, jnp.zeros((B, T, layer.out_embed_dim)), jnp.asarray(mask))[2]
    assert not np.asarray(of_x)[1][~mask].any()
    assert np.asarray(of_x)[1][mask].any()
    assert np.isfinite(np.asarray(of_layer.gate_weight)).all()


@every_case
def test_nothing_but_padding(name, compat):
    layer, x = make(name, compat), tokens()
    nothing = jnp.zeros((B, T), bool)
    (_, auxiliary), found, gradients = objective(layer, x, jnp.ones((B, T, layer.out_embed_dim)), nothing)
    assert auxiliary == 0
    for leaf in jax.tree.leaves((found, gradients)):
        assert np.isfinite(np.asarray(leaf)).all()
    for leaf in jax.tree.leaves(gradients):
        assert not np.asarray(leaf)[1].any()


@pytest.mark.parametrize(("compat", "want"), [(None, 0.4), ("libmoe", -0.1)])
def test_repeated_expert_accumulates(compat, want):
    """Slots +0, -0 and +1 with weights .5, .3 and .2 of equal experts: the later of two survives in LibMoE alone."""
    layer, x = make("smoe_tcmoe", compat), tokens()

    def first(leaf):
        return jnp.asarray(np.broadcast_to(leaf[:1], leaf.shape))

    layer = layer.replace(experts=jax.tree.map(first, layer.experts))
    ids, weights = np.tile([0, E, 1], (B, T, 1)), np.tile([0.5, 0.3, 0.2], (B, T, 1))
    run = jax.jit(lambda layer, *arrays: layer.compute_moe(*arrays))
    y = run(layer, ids, weights, np.zeros((B, T, O)), x)
    one = [expert(parameters(layer), 0, token) for token in x.reshape(-1, D)]
    np.testing.assert_allclose(np.reshape(y, (-1, O)), want * np.array(one), rtol=1e-12, atol=1e-12)


def test_ternary_toy_has_every_kind_of_collision():
    """Otherwise the golden values above would not see them."""
    layer, x = make("smoe_tcmoe"), tokens()
    want = PUBLISHED["smoe_tcmoe"](parameters(layer), x, K, np.ones((B, T), bool))
    rows = want.ids.reshape(-1, K).tolist()
    signs = [r for r in rows if any(e < E and e + E in r for e in r)]
    nulls = [r for r in rows if any(e >= 2 * E for e in r)]
    aliased = [r for r in nulls if any(n >= 2 * E and (n - 2 * E in r or n - E in r) for n in r)]
    assert signs
    assert nulls
    assert aliased


def test_gating_residual_against_numpy():
    layer, x = make("smoe_plus_plus"), tokens()
    previous = tokens(3, (B, T, layer.counts.router_outputs))
    y, _, aux = jax.jit(lambda layer, x, p: layer.run(x, Call(carry=p)))(layer, jnp.asarray(x), jnp.asarray(previous))
    want = smoe_plus_plus(parameters(layer), x, K, np.ones((B, T), bool), previous)
    np.testing.assert_allclose(y, want.output, rtol=1e-10, atol=1e-10)
    without = smoe_plus_plus(parameters(layer), x, K, np.ones((B, T), bool))
    assert np.abs(want.output - without.output).max() > 0.1
    z = x @ parameters(layer)["router.weight"].T + previous @ parameters(layer)["gate_residual"].T
    np.testing.assert_allclose(aux.carry, z, rtol=1e-10, atol=1e-10)


def test_libmoe_plus_plus_between_two_widths_is_smoe():
    """The special experts need equal widths; LibMoE's connector has none."""
    layer, x = make("smoe_plus_plus", "libmoe", sizes=(D, O, E, K)), tokens()
    y = call(layer, x)[0]
    want = LIBMOE["smoe"](parameters(layer), x, K, np.ones((B, T), bool))
    np.testing.assert_allclose(y, want.output, rtol=1e-10, atol=1e-10)
