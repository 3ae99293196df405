"""Registered layers in training: states outside of the gradient, micro-batches, runs that go on, what is no number."""

import json
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moejax
from moejax import ConfigError, MoejaxError, MoeLayer, register_moe
from moejax.layers import LAYERS
from moejax.models import Decoder, family
from moejax.training import Corpus, LossWeights, TrainState, language_model_loss, make_train_steps
from moejax.training.config import TrainConfig
from moejax.training.run import Run, held_out, summarise
from moejax.training.step import TrainSteps, after_step

MODEL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "num_experts": 6, "num_experts_per_tok": 3,
}  # fmt: skip
OPTIMISER = optax.sgd(0.1)


@pytest.fixture(scope="module")
def tokens(corpus_folder: Path) -> jax.Array:
    return jnp.asarray(Corpus.read(corpus_folder / "train.npz").tokens)


def decoder(moe: str, **fields: Any) -> Decoder:
    config = family("moejax").config({"model_type": "moejax", "vocab_size": 53, **MODEL, "moe": moe, **fields})
    rng = np.random.default_rng(0)

    def fill(leaf):
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map(fill, Decoder.abstract(config))


def balanced() -> TrainState:
    """DeepSeek-V3's layer without its small loss, which is a matter of micro-batches; its biases at zero."""
    args = {"balance_loss_coef": 0.0, "router_z_loss_coef": 0.01, "num_groups": 3, "num_selected_groups": 2}
    found = decoder("smoe_sharev3", moe_args=args)
    for layer in found.layers:
        layer.feed_forward.router.selection_bias = jnp.zeros(6)
    return TrainState.start(found, OPTIMISER)


@cache
def one_step(accumulate: int) -> TrainSteps:
    return make_train_steps(OPTIMISER, batch=4, length=9, count=1, seed=5, accumulate=accumulate)


def stepped(accumulate: int, tokens: jax.Array, state: TrainState | None = None) -> tuple[TrainState, Any]:
    return one_step(accumulate)(balanced() if state is None else state, tokens)


@pytest.mark.slow
def test_micro_batches_are_one_batch(tokens):
    (whole, metrics), (parts, other) = stepped(1, tokens), stepped(2, tokens)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(whole.decoder), jax.tree.leaves(parts.decoder), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    for name in ("cross_entropy", "router_z_loss", "load", "gradient_norm", "auxiliary"):
        np.testing.assert_allclose(metrics[name], other[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bias_moves_by_the_sign_of_the_lack_once_a_step(tokens, accumulate):
    """By 0.001 towards the mean load of the whole batch, whatever the number of micro-batches."""
    state, metrics = stepped(accumulate, tokens)
    for row, layer in enumerate(state.decoder.layers):
        load = np.asarray(metrics["load"])[0, row]
        want = 0.001 * np.sign(np.round(load.mean() - load, 6))
        assert set(np.sign(want)) >= {-1, 1}
        np.testing.assert_allclose(layer.feed_forward.router_bias, want, rtol=1e-5, atol=1e-9)


def test_logits_that_are_no_numbers_are_reported_with_their_layer(tokens):
    state = balanced()
    gate = state.decoder.layers[1].feed_forward
    gate.router.weight = gate.router.weight.at[2, 3].set(jnp.nan)
    state, metrics = stepped(1, tokens, state._replace(step=jnp.int32(7)))
    with pytest.raises(MoejaxError, match=r"step 8: router logits of mixture 1 \(counted from 0\) are not finite"):
        summarise(jax.device_get(metrics), int(state.step))


def test_relu_coefficient_moves_with_the_sparsity():
    found = decoder("remoe")
    for layer in found.layers:
        layer.feed_forward.log_l1 = jnp.zeros(())
    parts = {"active_experts": jnp.array([3.5, 2.0]), "load": jnp.ones((2, 6)) / 6}
    moved = [layer.feed_forward.log_l1 for layer in after_step(found, parts).layers]
    np.testing.assert_allclose(moved, [np.log(1.2), -np.log(1.2)], rtol=1e-6)
    assert found.layers[0].feed_forward.log_l1 == 0


@pytest.fixture
def registered_on_trial():
    with LAYERS.restored():
        yield


@pytest.mark.usefixtures("registered_on_trial")
def test_a_layer_that_never_asks_its_experts_is_trained_all_the_same():
    """Its forward is its own from end to end; it has a loss and no load."""

    @register_moe("average")
    class Average(MoeLayer):
        def forward(self, x, return_id_experts=False):
            y = self.experts.down.mean(0)[:, 0] + x
            return y, (y * y).mean(), None, {"size": (y * y).mean()}

    def step(found: Decoder) -> Any:
        _, parts = language_model_loss(found, jnp.ones((2, 10), jnp.int32), LossWeights())
        return after_step(found, parts), parts

    moved, parts = jax.jit(step)(decoder("average"))
    assert jax.tree.structure(moved) == jax.tree.structure(decoder("average"))
    assert not parts["load"].any()
    assert not parts["nonfinite"].any()
    assert float(parts["auxiliary"]) == pytest.approx(float(parts["size"].mean()))


@pytest.mark.parametrize("moe", ["remoe", "smoe_sharev3"])
def test_some_layers_dense_beside_attention_experts(moe):
    """Metrics that only registered layers report reach these layers, although other layers report attention experts."""
    found = decoder(moe, moe_layers=[1], num_attention_experts=4, num_attention_experts_per_tok=2)

    def step(found: Decoder) -> Any:
        _, parts = language_model_loss(found, jnp.ones((2, 10), jnp.int32), LossWeights())
        return after_step(found, parts), parts

    moved, parts = jax.eval_shape(step, found)
    assert jax.tree.structure(moved) == jax.tree.structure(found)
    assert parts["load"].shape == (1, 6)
    assert parts["attention_balance_loss"].shape == (2,)
    assert parts["balance_loss"].shape == (1,)


# ---- whole runs ----------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics but for the time they took."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in lines]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(corpus_folder, tmp_path):
    """Stopped after its first checkpoint, with half a line of a later step in its metrics."""
    config = TrainConfig(
        MODEL | {"moe": "smoe_plus_plus"},
        str(corpus_folder / "train.npz"),
        heldout=str(corpus_folder / "heldout.npz"),
        steps=4, batch=4, length=9, log_every=2, save_every=2, warmup=1, compute_dtype="float32",
    )  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    told = list(Run(config, whole))
    assert [row["step"] for row in told] == [2, 4]
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    shutil.rmtree(stopped / "model")
    with (stopped / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "cross_ent')
    assert [row["step"] for row in Run(config, stopped)] == [4]
    assert rows(stopped) == rows(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, stopped)]
    assert weights[0] == weights[1]
    lm = moejax.load(stopped / "model")
    assert lm.tokenizer is not None
    assert lm.config.num_experts == 10, "six, a zero, a copy and two constant ones"
    # a run that is complete trains no more
    assert list(Run(config, whole)) == []
    # and goes on to more steps, from one that the new interval does not divide
    longer = list(Run(replace(config, steps=9, log_every=3, save_every=3), whole))
    assert [row["step"] for row in longer] == [6, 9]
    assert all("heldout" in row for row in longer)


def test_every_window_is_held_out():
    model = decoder("smoe")
    tokens = np.random.default_rng(0).integers(0, 53, 7 * 5 + 3)
    logits = model(jnp.asarray(tokens[:35].reshape(7, 5)))
    after = jnp.asarray(tokens[1:36].reshape(7, 5, 1))
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), after, axis=-1).mean()
    np.testing.assert_allclose(held_out(model, tokens, 5, batch=3), want, rtol=1e-5)
    with pytest.raises(MoejaxError, match="5 held-out tokens have no window of length=5"):
        held_out(model, tokens[:5], 5)


def test_a_folder_holds_one_run_and_a_wrong_one_makes_none(corpus_folder, tmp_path, monkeypatch):
    """Two layers may have the same leaves: the second would publish the first one's weights under its name."""
    config = TrainConfig(MODEL, str(corpus_folder / "train.npz"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(config.with_moe("smoe"))))
    Run(config.with_moe("smoe_sigmoidgating"), tmp_path / "run")  # nothing was saved: the folder is free
    monkeypatch.setattr("moejax.training.run.newest_step", lambda _: 5)
    Run(replace(config.with_moe("smoe"), steps=2000), tmp_path / "run")
    with pytest.raises(ConfigError, match="run holds a run with another model; choose another folder"):
        Run(config.with_moe("smoe_sigmoidgating"), tmp_path / "run")
    with pytest.raises(ConfigError, match="MoE layer 'nonsense' is unknown"):
        Run(config.with_moe("nonsense"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
