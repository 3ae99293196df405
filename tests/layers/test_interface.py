"""The registry, settings, and what a user may get wrong."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny.layers import D, E, K, O

import moejax
from moejax import ConfigError, MoeArgs, MoeLayer, get_moe, register_moe
from moejax.layers import LAYERS, MLP, Activation, MLPConfig


@pytest.fixture(autouse=True)
def _registry_as_it_was() -> Iterator[None]:
    with LAYERS.restored():
        yield


class TestRegistry:
    def test_returns_the_class_under_every_name(self):
        class Mine(MoeLayer):
            pass

        assert register_moe("mine", "mine_too")(Mine) is Mine
        assert get_moe("mine") is get_moe("mine_too") is Mine

    def test_a_name_is_needed(self):
        with pytest.raises(ConfigError, match="give the MoE layer a name"):
            register_moe()

    def test_a_clash_is_refused_and_registers_nothing(self):
        class Mine(MoeLayer):
            pass

        with pytest.raises(ConfigError, match=r"'smoe' is registered already: moejax\..*variants\.smoe\.SMoE"):
            register_moe("fresh", "smoe")(Mine)
        with pytest.raises(ConfigError, match="MoE layer 'fresh' is unknown"):
            get_moe("fresh")
        assert get_moe("smoe").__name__ == "SMoE"

    def test_a_cell_may_run_twice(self):
        def cell() -> type[MoeLayer]:
            @register_moe("mine")
            class Mine(MoeLayer):
                pass

            return Mine

        cell()
        assert get_moe("mine") is cell() or get_moe("mine").__name__ == "Mine"

    def test_unknown_name_lists_what_exists(self):
        with pytest.raises(ConfigError, match=r"choose from .*expert_choice.*smoe, .*xmoe"):
            get_moe("somoe")

    def test_every_name_of_libmoe_exists(self):
        for name in ("", "_sigmoidgating", "_share", "_sharev3", "_tcmoe", "_plus_plus"):
            assert issubclass(get_moe(f"smoe{name}"), moejax.MoeLayer)
        assert issubclass(get_moe("xmoe"), moejax.MoeLayer)


class TestSettings:
    def test_defaults_need_no_settings(self):
        layer = MoeLayer(D, D, E, K)
        assert isinstance(layer.args, MoeArgs)
        assert (layer.num_of_experts, layer.num_selected, layer.in_embed_dim) == (E, K, D)

    def test_frozen(self):
        with pytest.raises(FrozenInstanceError):
            MoeArgs().balance_loss_coef = 2.0

    def test_any_object_with_some_of_the_names(self):
        """As a namespace of training arguments is, which has much else."""
        found = MoeArgs.of(SimpleNamespace(balance_loss_coef=0.5, std_gate=0.1, learning_rate=3))
        assert (found.balance_loss_coef, found.std_gate, found.router_z_loss_coef) == (0.5, 0.1, 0.001)

    def test_unknown_setting(self):
        with pytest.raises(ConfigError, match=r"MoeArgs has no balance_coef; it has: .*balance_loss_coef"):
            MoeLayer(D, D, E, K, args={"balance_coef": 1})

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("smoe", {"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
            ("smoe", {"activation": "gelo"}, "'gelo' is not supported"),
            ("smoe_sharev3", {"num_groups": 4}, "num_groups=4"),
            ("smoe_sharev3", {"num_groups": 3, "num_selected_groups": 4}, "num_selected_groups=4"),
            ("smoe_sharev3", {"num_groups": 3, "num_selected_groups": 1}, "must hold 3"),
        ],
    )
    def test_settings_that_make_no_sense(self, name, settings, message):
        with pytest.raises(ConfigError, match=message):
            get_moe(name)(D, D, E, K, args=settings)

    def test_initial_weights(self):
        small, wide = MoeLayer(D, D, E, K, args={"std_gate": 0.5}), MoeLayer(D, D, E, K, args={"init_weight": False})
        assert 0.3 < float(small.gate_weight.std()) < 0.7
        assert float(jnp.abs(wide.gate_weight).max()) <= D**-0.5
        assert float(jnp.abs(small.experts.down).max()) < 0.1
        assert not small.experts.gate_up_bias.any()

    def test_keys_decide_initial_weights(self):
        one, other, again = (MoeLayer(D, D, E, K, args=MoeArgs(key=jax.random.key(seed))) for seed in (1, 2, 1))
        assert not jnp.array_equal(one.gate_weight, other.gate_weight)
        assert jnp.array_equal(one.gate_weight, again.gate_weight)
        assert not jnp.array_equal(one.experts.down[0], one.experts.down[1])


def mlp(inputs: int, outputs: int, hidden: int = 4) -> MLP:
    config = MLPConfig(inputs, hidden, Activation("gelu"))
    return MLP(jnp.ones((1, hidden, inputs)), jnp.ones((outputs, hidden)), None, None, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((D, D, E, E + 1), f"num_selected={E + 1} must lie between 1 and num_of_experts={E}"),
        ((D, D, E, 0), "num_selected=0 must lie between 1"),
        ((D, O, E, K, mlp(D, D)), f"from {D} to {D} is given for a layer from {D} to {O}"),
        ((D, D, E, K, [mlp(D, D)] * 2), f"2 experts are given for a layer of {E}"),
        ((D, D, 2, 1, [mlp(D, D), mlp(D, D, 5)]), "differ in their architecture"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MoeLayer(*arguments)


def test_one_slot_is_too_few_beside_libmoes_shared_expert():
    with pytest.raises(ConfigError, match="takes one slot of at least two"):
        get_moe("smoe_share")(D, D, E, 1, args={"compat": "libmoe"})


def test_copy_experts_between_two_widths():
    with pytest.raises(ConfigError, match=f"equal widths, not {D} and {O}"):
        get_moe("smoe_plus_plus")(D, O, E, K)
