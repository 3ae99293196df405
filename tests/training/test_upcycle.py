"""Upcycled models compute what the dense ones did, as far as they should, and are what they say."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.compare import relative_rms

import moejax
from moejax.checkpoints.plan import leaf_paths
from moejax.layers import GLU, MLP, Activation, MLPConfig, registered
from moejax.models import Config, Decoder, family
from moejax.training import LossWeights, MixtureSpec, expert_stack, language_model_loss, upcycle

D, F, E, K, L, V, T = 24, 18, 6, 2, 2, 53, 11
PLAIN = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 777.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
TOKENS = np.random.default_rng(0).integers(4, V, (3, T))
SUMS_TO_ONE = {"smoe", "smoe_sigmoidgating", "xmoe"}
KEY = jax.random.key(5)


def dense(**changes: object) -> moejax.LM:
    """Random weights and biases, large enough for mistakes to show."""
    hugging_face = PLAIN | changes
    abstract = Decoder.abstract(family("llama").config(hugging_face))
    rng = np.random.default_rng(1)
    draws = [("norm" in path) + 0.2 * rng.normal(size=leaf.shape) for path, leaf in leaf_paths(abstract)]
    decoder = jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(draw, jnp.float32) for draw in draws])
    return moejax.LM(decoder, hugging_face=hugging_face)


def routed(lm: moejax.LM) -> np.ndarray:
    """The experts of every slot [L B T K]."""
    routing = lm.decoder.hidden(jnp.asarray(TOKENS)).routing()
    return np.stack([np.asarray(layer.ids) for layer in routing if layer is not None])


LM = dense()
BIASED = dense(mlp_bias=True, attention_bias=True)


def often(values: list, often: list) -> list:
    """All values; values that are not in ``often`` are slow tests."""
    return [value if value in often else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize(("lm", "split", "slots"), [(LM, 1, 2), (LM, 3, 3), (BIASED, 2, 4)])
def test_exact_before_training(lm: moejax.LM, split: int, slots: int) -> None:
    spec = MixtureSpec(E, slots)
    made = upcycle(lm, spec, key=KEY, split=split, tokens=TOKENS)
    assert relative_rms(made.model(TOKENS), lm(TOKENS)) <= 1e-6
    assert set(made.errors) == {f"layers.{i}.feed_forward" for i in range(L)}
    assert max(made.errors.values()) <= 1e-6
    config = made.model.config
    assert (config.num_experts, config.num_selected, config.expert_dim, config.dense_dim) == (E, slots, F // split, 0)
    assert lm.config.num_experts == 0
    assert jax.tree.structure(made.model.decoder) == jax.tree.structure(Decoder.abstract(config))
    # the router decides: other experts for other tokens
    assert len({tuple(sorted(row)) for row in routed(made.model).reshape(-1, slots).tolist()}) > 1


def test_parts_of_a_copy_are_selected_together() -> None:
    made = upcycle(LM, MixtureSpec(E, 4), key=KEY, split=2).model
    copies = np.sort(routed(made), -1).reshape(L, 3, T, 2, 2) // 2
    assert (copies[..., 0] == copies[..., 1]).all()
    # a part alone is not the layer: without the shared rows nothing holds
    layer = made.decoder.layers[0].feed_forward
    rows = np.asarray(layer.router.weight)
    assert np.array_equal(rows[::2], rows[1::2])
    broken = replace(made, decoder=jax.tree.map(lambda leaf: leaf, made.decoder))
    draws = jax.random.normal(KEY, rows.shape)
    for block in broken.decoder.layers:
        block.feed_forward.router.weight = draws
    assert relative_rms(broken(TOKENS), LM(TOKENS)) > 1e-2


@pytest.mark.parametrize("name", often(sorted(registered()), ["smoe", "smoe_share", "smoe_tcmoe"]))
def test_registered_layers(name: str, tmp_path: Path) -> None:
    """Layers whose weights sum to one are exact, others report their error. All make decoders that can be saved."""
    args = {"routed_scaling_factor": 1.0} if name == "smoe_sharev3" else None
    made = upcycle(LM, MixtureSpec(E, K, name, args), key=KEY, tokens=TOKENS, layers="layers.[1-9].*")
    assert set(made.errors) == {"layers.1.feed_forward"}
    assert (max(made.errors.values()) <= 1e-6) == (name in SUMS_TO_ONE), made.errors
    assert (relative_rms(made.model(TOKENS), LM(TOKENS)) <= 1e-6) == (name in SUMS_TO_ONE)
    config = made.model.config
    assert config.model_type == "moejax"
    assert jax.tree.structure(made.model.decoder) == jax.tree.structure(Decoder.abstract(config))
    moejax.export(made.model, tmp_path / "kept", progress=False)
    again = moejax.load(tmp_path / "kept")
    assert again.config == config
    assert np.array_equal(again(TOKENS), made.model(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("name", often(["smoe_share", "smoe_sharev3"], ["smoe_sharev3"]))
def test_shared_layers_of_libmoe_are_exact(name: str) -> None:
    made = upcycle(BIASED, MixtureSpec(E, K, name, {"compat": "libmoe"}), key=KEY, tokens=TOKENS)
    assert max(made.errors.values()) <= 1e-6
    assert relative_rms(made.model(TOKENS), BIASED(TOKENS)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", often(sorted(SUMS_TO_ONE), ["xmoe"]))
def test_registered_layers_are_split(name: str) -> None:
    made = upcycle(LM, MixtureSpec(E, 4, name), key=KEY, split=2, tokens=TOKENS)
    assert max(made.errors.values()) <= 1e-6
    assert made.model.config.expert_dim == F // 2


@pytest.mark.parametrize("split", often([1, 3], [3]))
def test_the_result_is_a_mixtral(split: int, tmp_path: Path) -> None:
    """Transformers' Mixtral computes the dense model's logits from the exported folder."""
    import torch
    import transformers

    made = upcycle(LM, MixtureSpec(E, 3), key=KEY, split=split, noise=0.0).model
    assert made.config.model_type == "mixtral"
    moejax.export(made, tmp_path / "mixtral", progress=False)
    again = moejax.load(tmp_path / "mixtral")
    assert again.config == made.config
    assert np.array_equal(again(TOKENS), made(TOKENS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", attn_implementation="eager")
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert theirs.config.eos_token_id == [2, 3]
    theirs.set_experts_implementation("eager")
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert relative_rms(logits, np.asarray(made(TOKENS))) <= 1e-5
    assert relative_rms(logits, np.asarray(LM(TOKENS))) <= 1e-5


def test_what_no_family_has_is_not_said_to_be_one() -> None:
    some = upcycle(LM, MixtureSpec(E, K), key=KEY, layers=re.compile(r"layers\.(0|7)\.feed_forward")).model
    assert [isinstance(block.feed_forward, MLPConfig) for block in some.config.blocks] == [False, True]
    assert relative_rms(some(TOKENS), LM(TOKENS)) <= 1e-6
    for made in (some, upcycle(BIASED, MixtureSpec(E, K), key=KEY).model):
        assert made.hugging_face is None
        with pytest.raises(moejax.ConfigError, match="Hugging Face config is not known"):
            moejax.export(made, "nowhere")


def test_a_decoder_is_upcycled_as_it_is() -> None:
    made = upcycle(LM.decoder, MixtureSpec(E, K), key=KEY).model
    assert isinstance(made, Decoder)
    assert relative_rms(made(jnp.asarray(TOKENS)), LM(TOKENS)) <= 1e-6
    assert made.embedding is LM.decoder.embedding


def mlp(unit: GLU | Activation, *, bias: bool = True) -> MLP:
    config = MLPConfig(D, F, unit, bias)
    made = MLP.init(KEY, config, jnp.float32)
    shapes = [leaf.shape for leaf in jax.tree.leaves(made)]
    draws = [0.7 * jax.random.normal(jax.random.key(i), s) + 0.2 * i for i, s in enumerate(shapes)]
    return jax.tree.unflatten(jax.tree.structure(made), draws)


def test_drop_draws_units_anew_each_expert_its_own() -> None:
    layer = mlp(GLU())
    stack = expert_stack(layer, E, KEY, drop=0.22)
    same_in = (np.asarray(stack.gate_up) == np.asarray(layer.gate_up)).all((1, 3))
    same_out = (np.asarray(stack.down) == np.asarray(layer.down)).all(1)
    same_bias = (np.asarray(stack.gate_up_bias) == np.asarray(layer.gate_up_bias)).all(1)
    assert (same_in.sum(1) == F - 4).all()
    assert np.array_equal(same_in, same_out)
    assert np.array_equal(same_in, same_bias)
    assert len({tuple(row) for row in same_in.tolist()}) == E
    # of 576 redrawn values of each branch: 5 standard errors
    for branch in range(2):
        fresh = np.asarray(stack.gate_up)[:, branch][~same_in]
        whole = np.asarray(layer.gate_up)[branch]
        assert abs(fresh.mean() - whole.mean()) < 5 * whole.std() / np.sqrt(fresh.size)
        assert abs(fresh.std() / whole.std() - 1) < 5 / np.sqrt(2 * fresh.size)
    # nothing is shared between experts, nor with what was dropped
    assert len(np.unique(np.asarray(stack.gate_up)[:, 0][~same_in])) > 0.99 * E * 4 * D


def test_noise_is_in_units_of_each_matrix() -> None:
    layer = mlp(Activation("relu"), bias=False)
    stack = expert_stack(layer, E, KEY, noise=0.3, split=2)
    whole = expert_stack(layer, E, KEY, split=2)
    for noisy, plain in ((stack.gate_up, whole.gate_up), (stack.down, whole.down)):
        difference = np.asarray(noisy) - np.asarray(plain)
        assert difference.std() / np.asarray(plain).std() == pytest.approx(0.3, rel=0.1)
        assert abs(np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1]) < 0.15


def test_layers_and_keys_are_independent() -> None:
    spec, options = MixtureSpec(E, K), {"noise": 0.5, "drop": 0.5}
    made, other = (upcycle(LM, spec, key=jax.random.key(i), tokens=TOKENS, **options) for i in range(2))
    routers = [layer.feed_forward.router.weight for m in (made, other) for layer in m.model.decoder.layers]
    rows = np.concatenate([np.asarray(r) for r in routers])
    assert np.abs(np.corrcoef(rows) - np.eye(len(rows))).max() < 0.7
    assert 0.005 < rows.std() < 0.04
    assert min(made.errors.values()) > 0.1
    again = upcycle(LM, spec, key=jax.random.key(0), **options).model
    assert all(map(np.array_equal, jax.tree.leaves(again.decoder), jax.tree.leaves(made.model.decoder)))


def test_error_is_that_of_the_layer() -> None:
    """Against the definition, on a first layer; padding does not count."""
    tokens, valid = TOKENS[:1].copy(), np.ones((1, T), bool)
    made = upcycle(LM, MixtureSpec(E, E), key=KEY, drop=0.3, tokens=tokens, layers="layers.0.*").errors
    few = upcycle(LM, MixtureSpec(E, E), key=KEY, drop=0.3, layers="layers.0.*").model
    valid[0, :3] = False
    # the difference of two models with one unlike layer is that layer's, where it enters the second
    ours, theirs, without = (
        np.asarray(d.hidden(jnp.asarray(tokens), reading=moejax.rules.Reading(gates=g)).entering[1])
        for d, g in (
            (few.decoder, moejax.Gates()),
            (LM.decoder, moejax.Gates()),
            (LM.decoder, moejax.Gates.ones(LM.config, tokens).drop_feed_forward(0)),
        )
    )
    expected = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - without)
    assert made["layers.0.feed_forward"] == pytest.approx(expected, rel=1e-4)
    padded = upcycle(LM, MixtureSpec(E, E), key=KEY, drop=0.3, tokens=tokens, valid=valid, layers="layers.0.*").errors
    assert padded != made


def test_bfloat16_stays_bfloat16() -> None:
    half = replace(LM, decoder=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), LM.decoder))
    for name in (None, "xmoe"):
        made = upcycle(half, MixtureSpec(E, 4, name), key=KEY, split=2, noise=0.01, tokens=TOKENS)
        assert {leaf.dtype for leaf in jax.tree.leaves(made.model.decoder)} == {jnp.dtype("bfloat16")}
        assert 1e-3 < max(made.errors.values()) < 0.1


def test_router_learns() -> None:
    """The task's gradient reaches every router and every part of the experts; equal experts give routers none."""
    weights, tokens = LossWeights(0.0, 0.0), jnp.asarray(TOKENS)
    gradient_of = jax.jit(jax.grad(lambda decoder: language_model_loss(decoder, tokens, weights)[0]))

    def router_gradients(**options: float) -> list[float]:
        decoder = upcycle(LM.decoder, MixtureSpec(E, K), key=KEY, **options).model
        gradient = gradient_of(decoder)
        assert all(np.abs(np.asarray(layer.feed_forward.experts.gate_up)).max() > 0 for layer in gradient.layers)
        return [float(jnp.abs(layer.feed_forward.router.weight).max()) for layer in gradient.layers]

    assert max(router_gradients()) < 1e-6
    assert min(router_gradients(drop=0.5)) > 1e-5


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (MixtureSpec(E, 3), {"split": 2}, "split=2 does not divide 3 num_selected"),
        (MixtureSpec(5, 2), {"split": 2}, "split=2 does not divide 5 num_experts"),
        (MixtureSpec(10, 5), {"split": 5}, "split=5 does not divide 18 hidden units"),
        (MixtureSpec(E, 4, "smoe_tcmoe"), {"split": 2}, "'smoe_tcmoe' cannot be split"),
        (MixtureSpec(E, 4, "smoe_share"), {"split": 2}, "'smoe_share' cannot be split"),
        (MixtureSpec(E, 4, "sigma_moe"), {"split": 2}, "'sigma_moe' cannot be split"),
        (MixtureSpec(E, K, "nothing"), {}, "MoE layer 'nothing' is unknown"),
        (MixtureSpec(E, K), {"layers": "layers.7.*"}, r"no dense layer matches layers='layers\.7\.\*'"),
        (MixtureSpec(E, K), {"noise": -1.0}, "noise=-1.0"),
        (MixtureSpec(E, K), {"drop": 1.5}, "drop=1.5"),
        (MixtureSpec(E, E + 1), {}, "more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(spec: MixtureSpec, options: dict, message: str) -> None:
    with pytest.raises(moejax.ConfigError, match=message):
        upcycle(LM, spec, key=KEY, **options)


def test_a_mixture_is_not_upcycled_again() -> None:
    made = upcycle(LM, MixtureSpec(E, K), key=KEY).model
    with pytest.raises(moejax.ConfigError, match="there is none in this model"):
        upcycle(made, MixtureSpec(E, K), key=KEY)
    clamped = tuple(replace(b, feed_forward=replace(b.feed_forward, unit=GLU(limit=7.0))) for b in LM.config.blocks)
    config: Config = replace(LM.config, blocks=clamped)
    decoder = Decoder.init(config, KEY)
    with pytest.raises(moejax.ConfigError, match="cannot compute"):
        upcycle(decoder, MixtureSpec(E, K, "smoe"), key=KEY)
    assert upcycle(decoder, MixtureSpec(E, K), key=KEY, tokens=TOKENS).errors["layers.0.feed_forward"] < 1e-6


SMOLLM2 = Path(__file__).parents[2] / "data" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="run scripts/prepare_smollm2.py to have data/smollm2")
@pytest.mark.parametrize("split", [1, 2])
def test_smollm2_becomes_a_mixtral_of_eight_experts(split: int) -> None:
    lm = moejax.load(SMOLLM2, dtype="float32")
    tokens = np.array([lm.encode("Once upon a time, there was a little girl named Emma who loved to play in the sun.")])
    made = upcycle(lm, MixtureSpec(8, 2 * split), key=KEY, split=split, tokens=tokens)
    assert made.model.config.model_type == "mixtral"
    error = relative_rms(made.model(tokens), lm(tokens))
    print(f"split {split}: logits {error:.2e}, layers {max(made.errors.values()):.2e}")
    assert error <= 1e-5
    assert max(made.errors.values()) <= 1e-5
    prompt = "The capital of France is"
    assert made.model.generate(prompt, max_new_tokens=2) == lm.generate(prompt, max_new_tokens=2) == " Paris."
