"""Training: the loss falls, and a run that was stopped goes on as if it had not been."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moejax
from moejax import MoejaxError
from moejax.checkpoints.plan import leaf_paths
from moejax.models import Decoder, family
from moejax.training import Corpus, LossWeights, StateStore, TrainState, language_model_loss, make_train_steps, windows
from moejax.training.config import TrainConfig
from moejax.training.step import TrainSteps


@pytest.fixture(scope="module")
def tokens(corpus_folder: Path) -> jax.Array:
    return jnp.asarray(Corpus.read(corpus_folder / "train.npz").tokens)


OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


@pytest.fixture(scope="module")
def three_steps() -> TrainSteps:
    """A program of three steps; compiled once for this file."""
    return make_train_steps(OPTIMISER, batch=4, length=12, count=3, seed=5)


@pytest.fixture
def fresh(toy_config: dict) -> TrainState:
    """The state before the first step."""
    decoder = Decoder.init(family("olmoe").config(toy_config), jax.random.key(0))
    return TrainState(decoder, OPTIMISER.init(decoder), jnp.zeros((), jnp.int32))


def assert_identical(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def copy(state: TrainState) -> TrainState:
    """The step gives its input's memory away."""
    return jax.tree.map(jnp.copy, state)


def test_loss_falls(fresh: TrainState, three_steps: TrainSteps, tokens: jax.Array) -> None:
    state, losses = fresh, []
    for _ in range(20):
        state, metrics = three_steps(state, tokens)
        losses += metrics["cross_entropy"].tolist()
    assert int(state.step) == 60
    assert losses[0] == pytest.approx(np.log(53), abs=0.1), "an untrained model knows nothing"
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    own = {"cross_entropy", "auxiliary", "balance_loss", "router_z_loss", "load", "nonfinite", "gradient_norm"}
    assert set(metrics) == own
    assert metrics["load"].shape == (3, 2, 9)
    np.testing.assert_allclose(metrics["load"].sum(-1), 1, rtol=1e-5)


def test_every_parameter_learns(fresh: TrainState, three_steps: TrainSteps, tokens: jax.Array) -> None:
    before = copy(fresh)
    after, _ = three_steps(fresh, tokens)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(before.decoder), jax.tree.leaves(after.decoder), strict=True
    ):
        assert not np.array_equal(x, y), jax.tree_util.keystr(path)


def test_loss_is_that_of_plain_numpy(fresh: TrainState, tokens: jax.Array) -> None:
    batch = windows(tokens, jax.random.key(3), 3, 8)
    total, parts = language_model_loss(fresh.decoder, batch, LossWeights(balance=0.3, z=0.2))
    logits = np.asarray(fresh.decoder(batch[:, :-1]), np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probability, np.asarray(batch)[:, 1:, None], -1)
    assert float(parts["cross_entropy"]) == pytest.approx(-picked.mean(), rel=1e-5)
    weighted = parts["cross_entropy"] + 0.3 * parts["balance_loss"].mean() + 0.2 * parts["router_z_loss"].mean()
    assert float(total) == pytest.approx(float(weighted), rel=1e-6)


def test_resumed_run_is_bit_identical(
    fresh: TrainState, three_steps: TrainSteps, tokens: jax.Array, tmp_path: Path
) -> None:
    """Six steps in a row against three, a save, a restore into another state, and three more."""
    start = copy(fresh)
    whole, _ = three_steps(three_steps(fresh, tokens)[0], tokens)
    half, _ = three_steps(copy(start), tokens)
    StateStore(tmp_path).save(half)
    restored = StateStore(tmp_path).restore(start)
    assert restored is not None
    assert int(restored.step) == 3
    assert_identical(restored, half)
    assert_identical(three_steps(restored, tokens)[0], whole)


def test_a_save_that_was_killed_is_passed_over(fresh: TrainState, tmp_path: Path) -> None:
    """A kill leaves a temporary folder, or one without its end mark; the state before it counts."""
    store = StateStore(tmp_path)
    store.save(fresh._replace(step=jnp.int32(3)))
    (finished,) = [f for f in tmp_path.iterdir() if f.name == "3"]
    shutil.copytree(finished, tmp_path / "6.orbax-checkpoint-tmp-1")
    restored = StateStore(tmp_path).restore(fresh)
    assert restored is not None
    assert int(restored.step) == 3


def test_nothing_to_restore(fresh: TrainState, tmp_path: Path) -> None:
    assert StateStore(tmp_path).restore(fresh) is None


def test_earlier_name_of_the_store() -> None:
    with pytest.warns(DeprecationWarning, match=r"moejax\.training\.StateStore"):
        earlier = moejax.training.Checkpoints
    assert earlier is StateStore


def test_only_the_newest_are_kept(fresh: TrainState, tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(fresh._replace(step=jnp.int32(step)))
    assert {f.name for f in tmp_path.iterdir()} == {"2", "3"}


def test_windows_depend_on_their_key_alone(tokens: jax.Array) -> None:
    first = windows(tokens, jax.random.key(1), 6, 10)
    assert first.shape == (6, 10)
    np.testing.assert_array_equal(first, windows(tokens, jax.random.key(1), 6, 10))
    assert not np.array_equal(first, windows(tokens, jax.random.key(2), 6, 10))


def test_windows_are_pieces_of_the_corpus_up_to_its_last_token() -> None:
    corpus = jnp.arange(12)
    drawn = np.asarray(windows(corpus, jax.random.key(0), 400, 5))
    np.testing.assert_array_equal(drawn - drawn[:, :1], np.tile(np.arange(5), (400, 1)))
    assert set(drawn[:, 0]) == set(range(8)), "every place is drawn, the last included"


def test_corpus_documents(corpus_folder: Path) -> None:
    corpus = Corpus.read(corpus_folder / "heldout.npz")
    documents = corpus.documents()
    assert len(documents) == len(corpus.domains) == 4
    np.testing.assert_array_equal(np.concatenate(documents), corpus.tokens)
    assert all(d[-1] == 0 for d in documents[:-1])


def test_missing_corpus_names_the_script_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MoejaxError, match=r"prepare_corpus\.py"):
        Corpus.read(tmp_path / "train.npz")


def test_file_that_is_no_corpus(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", tokens=np.arange(3))
    with pytest.raises(MoejaxError, match="doc_starts, doc_domain"):
        Corpus.read(tmp_path / "train.npz")


def test_matrices_alone_are_decayed() -> None:
    """Biases are not decayed, although biases of heads and of experts have several axes."""
    model = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "moe": "smoe"}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = model | heads | {"moe_args": {"expert_bias": True}, "num_experts": 4, "num_experts_per_tok": 2}
    decoder = jax.tree.map(jnp.ones_like, Decoder.init(family("moejax").config(config), jax.random.key(0)))
    optimiser = TrainConfig(model=config, data="sample").optimiser()
    state, nothing = optimiser.init(decoder), jax.tree.map(jnp.zeros_like, decoder)
    for _ in range(2):  # the first step's rate is zero
        updates, state = optimiser.update(nothing, state, decoder)
    for path, update in leaf_paths(updates):
        kept = path == "embedding" or "bias" in path or "norm" in path
        assert np.all(np.asarray(update) == 0) == kept, path
    assert {"layers.0.attention.query_key_value.bias", "layers.0.feed_forward.experts.gate_up_bias"} <= {
        path for path, _ in leaf_paths(decoder)
    }
