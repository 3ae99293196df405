"""A mixture with a temperature: the router's logits are divided by it before softmax and top-k."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from moejax import MoeArgs, MoeLayer, register_moe


@dataclass(frozen=True)
class TemperatureArgs(MoeArgs):
    """``temperature``: above one routing weights become more even, below one more uneven."""

    temperature: float = 1.0


@register_moe("smoe_temperature")
class TemperatureMoE(MoeLayer):
    """Softmax top-k routing of logits over a temperature."""

    Args = TemperatureArgs

    def topk_expert(
        self, gate_logits: Float[Array, "B T R"]
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"], Float[Array, "B T R"]]:
        """Weights of the selected experts, their ids, and the scores of all experts."""
        return super().topk_expert(gate_logits / self.args.temperature)


if __name__ == "__main__":
    import jax

    x = jax.random.normal(jax.random.key(0), (3, 7, 24))
    sharpest = {}
    for temperature in (1.0, 0.1):
        args = {"temperature": temperature, "std_gate": 1.0}
        layer = TemperatureMoE(in_embed_dim=24, out_embed_dim=20, num_of_experts=6, num_selected=2, args=args)
        output, auxiliary_loss, _, info = layer(x)
        assert output.shape == (3, 7, 20)
        sharpest[temperature] = float(layer.topk_expert(layer.gate(x))[0].max(-1).mean())
    print("mean weight of the best expert, by temperature:", sharpest)
    assert sharpest[0.1] > sharpest[1.0]
