"""Mistakes that people make with a layer are told in the layer's words; what LibMoE's guide writes runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import MoejaxError, MoeLayer, get_moe

pytestmark = pytest.mark.fast

B, T, D, OUT, E, K = 2, 5, 12, 10, 4, 2
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@pytest.fixture(scope="module")
def layer() -> MoeLayer:
    return get_moe("smoe")(D, OUT, E, K, args={"std_gate": 0.5})


def test_numpy_is_taken(layer: MoeLayer) -> None:
    np.testing.assert_array_equal(layer(X)[0], layer(jnp.asarray(X))[0])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], rf"SMoE takes \[B T D\] with D={D}, not \({T}, {D}\); add an axis of sequences: x\[None\]"),
        (X[..., :7], rf"with D={D}, not \({B}, {T}, 7\)\."),
        (X[0, 0], rf"with D={D}, not \({D},\)\."),
        (X.tolist(), r"takes an array \[B T D\], not list"),
    ],
    ids=["no batch", "width", "one axis", "list"],
)
def test_input_of_another_shape(layer: MoeLayer, x: Any, message: str) -> None:
    with pytest.raises(MoejaxError, match=message.replace("SMoE", type(layer).__name__)):
        layer(x)


class Unfinished(MoeLayer):
    def forward(self, x: Any, return_id_experts: bool = False) -> Any:
        pass


class AsInTheGuide(MoeLayer):
    """Initial weights without a key, and a dictionary to log into."""

    def init_gate_weights(self, std: float = 0.02) -> Any:
        return std * jnp.ones((self.num_of_experts, self.in_embed_dim))

    def forward(self, x: Any, return_id_experts: bool = False) -> Any:
        self.log_metrics["mean_input"] = x.mean()
        return super().forward(x, return_id_experts)


def test_forward_that_returns_nothing() -> None:
    with pytest.raises(MoejaxError, match=r"Unfinished\.forward returned NoneType; it returns four things"):
        Unfinished(D, OUT, E, K)(X)


def test_overrides_of_the_guide() -> None:
    layer = AsInTheGuide(D, OUT, E, K, args={"std_gate": 0.3})
    np.testing.assert_allclose(layer.gate_weight, 0.3)
    info = jax.jit(lambda layer, x: layer(x)[3])(layer, jnp.asarray(X))
    np.testing.assert_allclose(info["mean_input"], X.mean(), rtol=1e-5)
    assert layer.log_metrics == {}


class OfTorch(MoeLayer):
    def forward(self, x: Any, return_id_experts: bool = False) -> Any:
        output, loss, nothing, info = super().forward(x)
        return output, loss, nothing, {name: value.clone().detach() for name, value in info.items()}


class InPlace(MoeLayer):
    def init_gate_weights(self, std: float = 0.02) -> Any:
        self.gate_weights = std


def test_habits_of_torch_are_answered() -> None:
    layer = OfTorch(D, OUT, E, K)
    message = r"OfTorch\.forward calls \.(clone|detach)\(\) on an array of JAX, which has none; leave \.clone"
    with pytest.raises(MoejaxError, match=message):
        layer(X)
    with pytest.raises(MoejaxError, match=message):
        jax.jit(lambda x: layer(x)[0])(X)
    with pytest.raises(MoejaxError, match=r"InPlace\.init_gate_weights returned None; it returns the initial weights"):
        InPlace(D, OUT, E, K)


def test_calls_are_written_as_in_libmoe(layer: MoeLayer) -> None:
    output, auxiliary_loss, nothing, infor_aux = layer(X, return_id_experts=True)
    assert nothing is None
    assert {"selected_experts", "weights", "gate_softmax", "router_magine"} <= set(infor_aux)
    np.testing.assert_allclose(layer.forward(jnp.asarray(X), return_id_experts=True)[0], output, rtol=1e-6)
    assert layer(X, True)[3].keys() == infor_aux.keys()
    assert set(layer(X)[3]) == {"balance_loss", "router_z_loss"}
    assert auxiliary_loss.shape == ()
