"""Training over several devices: the loss curve, the loads and the weights are those of one device."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.layers import LAYERS
from moejax.models import Decoder, family, shard
from moejax.models.sharding import shardings
from moejax.training import TrainState, make_train_steps
from moejax.training.config import TrainConfig

MODEL: dict[str, Any] = {
    "model_type": "moejax", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
STEPS = 5


def decoder(moe: str) -> Decoder:
    config = family("moejax").config(MODEL | {"moe": moe})
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), Decoder.abstract(config))


def trained(moe: str, mesh: dict[str, int], accumulate: int = 1) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Metrics of some steps, and the weights after them."""
    devices, optimiser = TrainConfig(MODEL, "", mesh=mesh).device_mesh(), optax.adam(1e-2)
    found = decoder(moe) if devices is None else shard(decoder(moe), devices)
    steps = make_train_steps(optimiser, batch=8, length=9, count=STEPS, seed=5, mesh=devices, accumulate=accumulate)
    tokens = jnp.asarray(np.random.default_rng(1).integers(2, 53, 400), jnp.int32)
    state, metrics = steps(TrainState.start(found, optimiser), tokens)
    if mesh.get("expert", 1) > 1:
        placed = state.decoder.layers[0].feed_forward.experts.down.sharding
        assert placed.spec[0] == "expert", "every device holds some experts, also after the steps"
    return jax.device_get(metrics), [np.asarray(leaf) for leaf in jax.tree.leaves(state.decoder)]


@cache
def alone(moe: str) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    return trained(moe, {})


@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 2}, {"data": 4}], ids=str)
@pytest.mark.parametrize(
    "moe",
    [
        "smoe_sharev3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("smoe", "smoe_tcmoe", "smoe_plus_plus", "remoe", "xmoe", "expert_choice")
        ),
    ],
)
def test_loss_curve_is_that_of_one_device(moe, mesh):
    (metrics, weights), (want, expected) = trained(moe, mesh), alone(moe)
    assert len(want["cross_entropy"]) == STEPS
    assert want["cross_entropy"][-1] != want["cross_entropy"][0]
    for name in want:
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for x, y in zip(weights, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)


@pytest.mark.slow
def test_micro_batches_over_devices():
    metrics, _ = trained("sigma_moe", {"data": 2, "expert": 2}, accumulate=2)
    want, _ = trained("sigma_moe", {}, accumulate=2)
    np.testing.assert_allclose(metrics["cross_entropy"], want["cross_entropy"], rtol=1e-4)


@pytest.mark.parametrize("moe", ["remoe", "xmoe"])
def test_numbers_without_an_axis_lie_on_every_device(moe):
    mesh = TrainConfig(MODEL, "", mesh={"data": 2, "expert": 2}).device_mesh()
    placed = shardings(Decoder.abstract(family("moejax").config(MODEL | {"moe": moe})), mesh)
    name = "log_l1" if moe == "remoe" else "log_temperature"
    assert not any(placed[f"layers.1.feed_forward.{name}"].spec)


def test_a_registered_layers_own_leaves_lie_on_every_device():
    """Also those that have the name of a leaf of a published family."""
    from moejax import MoeLayer, register_moe

    with LAYERS.restored():

        @register_moe("with_names")
        class Named(MoeLayer):
            def __init__(self, *sizes: Any, args: Any = None) -> None:
                super().__init__(*sizes, args=args)
                self.down = jnp.ones((3, 5))
                self.bias = jnp.ones((2, 2))

        mesh = TrainConfig(MODEL, "", mesh={"expert": 4}).device_mesh()
        config = family("moejax").config(MODEL | {"moe": "with_names"})
        placed = shardings(Decoder.abstract(config), mesh)
        assert placed["layers.0.feed_forward.experts.down"].spec[0] == "expert"
        for name in ("down", "bias", "router.weight"):
            assert not any(placed[f"layers.0.feed_forward.{name}"].spec), name
