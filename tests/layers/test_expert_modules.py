"""Any module as an expert: its output is that of the modules one by one, with every way of giving it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from tiny.decoders import PROMPT, best_and_worst, noisy
from tiny.tokenizers import word_tokenizer

import moejax
from layers.modules import FeedForward, Linen, ModuleMoE, Plain
from layers.test_in_decoder import hugging_face
from moejax import LM, ConfigError, MoeLayer, explain, get_moe, register_moe
from moejax.checkpoints import save_folder
from moejax.checkpoints.plan import leaf_paths
from moejax.layers import LAYERS, ModuleExperts
from moejax.models import family
from moejax.ops.experts import assign, grouped_map, permute, unpermute
from moejax.rules import RULES
from moejax.study.similarity import similarities
from moejax.training import LossWeights, MixtureSpec, TrainConfig, language_model_loss, upcycle

B, T, D, OUT, E, K = 2, 5, 12, 10, 4, 2
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def module(seed: int = 0, inputs: int = D, outputs: int = OUT) -> FeedForward:
    return FeedForward(inputs, outputs, rngs=nnx.Rngs(seed))


def linen_module(seed: int = 0) -> Any:
    return Linen(OUT).bind(Linen(OUT).init(jax.random.key(seed), X[0]))


def plain(seed: int = 0) -> Plain:
    return Plain(D, OUT, seed)


def by_hand(several: list[Callable[[Any], Any]], info: dict[str, Any]) -> np.ndarray:
    """The weighted sum over each token's experts, all experts computed for all tokens."""
    outputs = np.stack([np.asarray(e(X.reshape(-1, D))).reshape(B, T, -1) for e in several], axis=2)
    chosen = np.take_along_axis(outputs, np.asarray(info["selected_experts"])[..., None], axis=2)
    return (np.asarray(info["weights"])[..., None] * chosen).sum(2)


@pytest.mark.parametrize("make", [module, linen_module, plain])
@pytest.mark.parametrize("how", ["one", "several"])
def test_output_is_that_of_the_modules(make: Callable[[int], Any], how: str) -> None:
    several = [make(i if how == "several" else 0) for i in range(E)]
    layer = MoeLayer(D, OUT, E, K, several if how == "several" else several[0], args={"std_gate": 0.5})
    output, _, _, info = layer(X, return_id_experts=True)
    np.testing.assert_allclose(output, by_hand(several, info), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("factory", [partial(FeedForward, D, OUT), Linen(OUT)])
def test_a_factory_makes_each_expert(factory: Any) -> None:
    layers = [MoeLayer(D, OUT, E, K, factory, args={"key": jax.random.key(seed)}) for seed in (0, 0, 1)]
    weights = [layer.experts.weights for layer in layers]
    name = max(weights[0], key=lambda n: weights[0][n].size)
    np.testing.assert_array_equal(weights[0][name], weights[1][name])
    assert not np.array_equal(weights[0][name], weights[2][name])
    assert not np.array_equal(weights[0][name][0], weights[0][name][1])


def test_weights_that_are_stacked_already() -> None:
    stacked = jax.vmap(lambda key: FeedForward(D, OUT, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), E))
    layer = MoeLayer(D, OUT, E, K, ModuleExperts.of(stacked), args={"std_gate": 0.5})
    several = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(E)]
    output, _, _, info = layer(X, return_id_experts=True)
    np.testing.assert_allclose(output, by_hand(several, info), rtol=2e-5, atol=2e-5)
    with pytest.raises(ConfigError, match="weights of FeedForward are not stacked"):
        ModuleExperts.of(module())


@pytest.mark.parametrize("compat", [None, "libmoe"])
def test_copies_compute_what_the_module_did(compat: str | None) -> None:
    """Upcycling from one instance; LibMoE's shared layer too, where each side counts one half."""
    layer = get_moe("smoe_share" if compat else "smoe")(D, OUT, E, K, module(), args={"compat": compat})
    np.testing.assert_allclose(layer(X)[0], module()(jnp.asarray(X)), rtol=2e-5, atol=2e-5)


def test_shared_module_is_added() -> None:
    several = [module(i) for i in range(E + 1)]
    layer = get_moe("smoe_share")(D, OUT, E, K, several, args={"std_gate": 0.5, "num_shared": 2})
    output, _, _, info = layer(X, return_id_experts=True)
    want = by_hand(several[:-1], info) + 2 * np.asarray(several[-1](jnp.asarray(X)))
    np.testing.assert_allclose(output, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("tokens", [2, 90])
def test_no_slot_is_dropped_and_gradients_are_right(tokens: int, even: bool) -> None:
    """Few tokens copy weights; many fill buffers, all of them one expert's in the uneven case."""
    experts, slots = 8, 2
    several = [module(i) for i in range(experts)]
    stack = MoeLayer(D, OUT, experts, slots, several).experts
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(tokens, 1, D)), jnp.float32)
    scores = rng.random((tokens, experts)) + (0 if even else 9 * (np.arange(experts) == 5))
    ids = jnp.asarray(np.argsort(-scores, axis=1)[:, :slots])
    assignment = assign(ids, experts)

    def grouped(weights: Any, x: jax.Array) -> jax.Array:
        return unpermute(grouped_map(stack.definition, weights, permute(x, assignment), assignment), assignment)

    def every(weights: Any, x: jax.Array) -> jax.Array:
        outputs = jax.vmap(stack.definition, (0, None))(weights, x[:, 0])
        return jnp.take_along_axis(jnp.moveaxis(outputs, 0, 1), ids[..., None], axis=1)

    cotangent = jnp.asarray(rng.normal(size=(tokens, slots, OUT)), jnp.float32)

    def both(f: Callable[..., jax.Array]) -> Any:
        y, pull = jax.vjp(f, stack.weights, x)
        return y, pull(cotangent)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), jax.jit(both, static_argnums=0)(grouped), both(every)
    )


class Forgetful(FeedForward):
    def __call__(self, x: jax.Array) -> Any:
        self.up(x)


class WithDropout(FeedForward):
    def __init__(self, *sizes: int, rngs: nnx.Rngs) -> None:
        super().__init__(*sizes, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Nested:
    def __init__(self) -> None:
        self.inner = plain()

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x)


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(OUT)(linen.BatchNorm(use_running_average=True)(x))


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (lambda: module(outputs=D), f"from {D} to {D} is given for a layer from {D} to {OUT}"),
        (lambda: module(inputs=7), rf"an expert FeedForward does not take \[N, {D}\]: .*"),
        (partial(Forgetful, D, OUT), rf"Forgetful maps \[N, D\] to \[N, O\]; for \[3, {D}\] it returned NoneType"),
        (partial(WithDropout, D, OUT), "WithDropout has dropout.rngs.count, a RngCount: leave it out"),
        (FeedForward, "also needs inputs, outputs; give these with functools.partial"),
        ([module()], f"1 experts are given for a layer of {E}"),
        ([module(0), plain(), module(1), module(2)], "differ in their architecture"),
        (3, "expert=3 cannot be called"),
        (Nested(), "Nested.inner is neither an array nor a setting"),
        (Normed(), "Normed has batch_stats"),
        (lambda: lambda x: x, "has no weights"),
    ],
)
def test_mistakes(expert: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLayer(D, OUT, E, K, expert)


# ---- in a decoder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm() -> Iterator[LM]:
    with LAYERS.restored():
        register_moe("modules")(ModuleMoE)
        fields = hugging_face("modules")
        yield LM(noisy(family("moejax").config(fields), 3, jnp.float32), word_tokenizer(), "modules", fields)


@pytest.mark.parametrize("rule", ["attnlrp", "proportional"])
def test_ledger_books_what_modules_do_not_conserve(lm: LM, rule: str) -> None:
    relevance = explain(lm, PROMPT, target=best_and_worst(lm), rule=RULES[rule])
    residual = relevance.ledger.residual / relevance.ledger.target
    assert float(np.abs(residual).max()) <= 1e-5
    assert np.abs(relevance.ledger.leaks["expert"][0, :2]).min() > 1e-3
    assert np.abs(relevance.experts).max() > 0


def test_an_expert_off_is_its_term_removed(lm: LM) -> None:
    gates = moejax.Gates.ones(lm.config, [PROMPT])
    effect = np.abs(lm([PROMPT], gates=gates.drop_expert(0, 2)) - lm([PROMPT])).max()
    assert effect > 1e-3
    assert "neurons.0" not in moejax.nodes(lm).names
    assert lm.run_with_cache(PROMPT, names=["expert_outputs.1"])[1]["expert_outputs.1"].shape == (1, len(PROMPT), 3, 40)


def test_stored_generated_from_and_measured(lm: LM, tmp_path: Any) -> None:
    save_folder(lm.decoder, dict(lm.hugging_face), tmp_path / "files")
    again = moejax.load(tmp_path / "files")
    assert again.config == lm.config
    for (path, ours), theirs in zip(leaf_paths(again.decoder), jax.tree.leaves(lm.decoder), strict=True):
        np.testing.assert_array_equal(ours, theirs, path)
    answer = lm.generate_ids([PROMPT], max_new_tokens=2)[0]
    assert int(lm([PROMPT])[0, -1].argmax()) == answer[0]
    assert all(s.experts is not None and abs(s.experts) < 1 for s in similarities(lm.decoder))
    assert lm.config.role("layers.0.feed_forward.experts.weights.up.kernel") == "expert"


def test_a_dense_layer_is_no_such_module(lm: LM) -> None:
    dense = noisy(family("moejax").config(hugging_face("modules", gated=True) | {"moe": None}), 3, jnp.float32)
    with pytest.raises(ConfigError, match="experts of 'modules' are modules of its own"):
        upcycle(dense, MixtureSpec(4, 2, layer="modules"), key=jax.random.key(0))


def test_every_weight_learns_and_vectors_do_not_decay(lm: LM) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 97, (2, 10)))
    gradient = jax.jit(jax.grad(lambda d: language_model_loss(d, tokens, LossWeights())[0]))(lm.decoder)
    for path, leaf in leaf_paths(gradient):
        assert np.abs(leaf).max() > 0, path
    still = replace(TrainConfig({}, ""), weight_decay=0.5, learning_rate=1.0, warmup=1, steps=100).optimiser()
    zeros = jax.tree.map(jnp.zeros_like, lm.decoder)
    state = still.update(zeros, still.init(lm.decoder), lm.decoder)[1]
    updates = dict(leaf_paths(still.update(zeros, state, lm.decoder)[0]))
    of_experts = "layers.0.feed_forward.experts.weights."
    assert np.abs(updates[f"{of_experts}up.kernel"]).max() > 0
    for name in ("norm.scale", "norm.bias", "up.bias"):
        assert not updates[f"{of_experts}{name}"].any(), name
