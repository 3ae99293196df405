"""A training config's weights of the auxiliary losses count, for registered layers too, or are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moejax import ConfigError
from moejax.layers import LAYERS
from moejax.models import Decoder
from moejax.training import language_model_loss
from moejax.training.config import TrainConfig
from moejax.training.run import Run

MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def config(moe: str = "smoe", moe_args: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    return TrainConfig({**MODEL, "moe": moe, "moe_args": moe_args or {}}, "sample", **changes)


def auxiliary(settings: TrainConfig) -> float:
    decoder = Decoder.init(settings.architecture(53), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 53)
    return float(language_model_loss(decoder, jnp.asarray(tokens), settings.loss_weights())[1]["auxiliary"])


def test_zero_adds_nothing_to_the_loss_of_a_registered_layer() -> None:
    assert auxiliary(config()) > 0
    assert auxiliary(config(balance_loss_coef=0.0, router_z_loss_coef=0.0)) == 0
    # what the model says of its layer is more special than the run
    assert auxiliary(config(moe_args={"balance_loss_coef": 0.5}, balance_loss_coef=0.0, router_z_loss_coef=0.0)) > 0.1


@pytest.mark.parametrize("moe", [name for name in LAYERS if LAYERS[name].Args.UNUSED])
def test_what_a_layer_does_not_read_is_refused(moe: str) -> None:
    with pytest.raises(ConfigError, match=f"does nothing in the layer '{moe}'"):
        config(moe, balance_loss_coef=0.0).architecture(53)


def test_unset_is_the_layers_own() -> None:
    layer: Any = config("sigma_moe").architecture(53).blocks[0].feed_forward
    assert layer.args.balance_loss_coef == 0.001
    assert config().loss_weights().balance == 0.01


def test_a_folder_of_an_older_version_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote 0.01 and 0.001 where nothing was set."""
    settings = config(length=16)
    old = dataclasses.asdict(settings) | {"balance_loss_coef": 0.01, "router_z_loss_coef": 0.001}
    (tmp_path / "config.json").write_text(json.dumps(old))
    monkeypatch.setattr("moejax.training.run.newest_step", lambda _: 5)
    Run(settings, tmp_path)
