"""MoE++: experts that compute nothing, next to nothing, or a mixture with a constant (Jin et al., arXiv 2410.07348)."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.errors import ConfigError
from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer, RouteCounts, as_routing
from moejax.layers.feed_forward.registry import register_moe
from moejax.layers.feed_forward.router import RouterConfig
from moejax.layers.linear import matmul_f32_accum


@dataclass(frozen=True)
class PlusPlusArgs(MoeArgs):
    """Settings of :class:`PlusPlusMoE`.

    Attributes:
        num_zero, num_copy, num_constant: experts of each kind beside the routed ones.
        tau: weight of these in the balance loss; below 1 the router is freer to use them.
        gating_residual: the logits of the layer below are added, through a matrix that begins at zero.
    """

    num_zero: int = 1
    num_copy: int = 1
    num_constant: int = 2
    tau: float = 0.75
    gating_residual: bool = True


@register_moe("smoe_plus_plus")
class PlusPlusMoE(MoeLayer):
    """Zero, copy and constant experts after the ``E`` routed ones, gating residuals, a heterogeneous balance loss.

    LibMoE has one zero and one constant expert, where the two widths are equal, neither copy nor residual, weights that
    sum to one, and 1.3 as the balance weight of expert 4, whichever that is.

    Raises:
        ConfigError: a copy or constant expert in a layer whose two widths differ.
    """

    Args = PlusPlusArgs

    def add_weights(self, args: PlusPlusArgs) -> None:
        (_, copy, constant), width, output = self._kinds, self.in_embed_dim, self.out_embed_dim
        if copy + constant and width != output:
            raise ConfigError(f"copy and constant experts need equal widths, not {width} and {output}.")
        self.constants = 0.002 * jax.random.normal(args.draw("constants"), (constant, output))
        self.constant_gates = self._initial(args.draw("constant_gates"), (constant, 2, width), args.std_gate)
        carries = args.gating_residual and not args.compat
        self.gate_residual = jnp.zeros((self.counts.router_outputs, self.counts.router_outputs)) if carries else None

    @property
    def _kinds(self) -> tuple[int, int, int]:
        a = self.args
        if a.compat:
            return (1, 0, 1) if self.in_embed_dim == self.out_embed_dim else (0, 0, 0)
        return a.num_zero, a.num_copy, a.num_constant

    @property
    def counts(self) -> RouteCounts:
        ids = self.num_of_experts + sum(self._kinds)
        return super().counts._replace(ids=ids, router_outputs=ids)

    def router_config(self) -> RouterConfig:
        return replace(super().router_config(), weigh="renormalised" if self.args.compat else "raw")

    def gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        logits = super().gate(x)
        if self.gate_residual is None:
            return logits
        if self.previous is not None:
            logits = logits + matmul_f32_accum(self.previous, self.gate_residual)
        self.record("carry", logits)
        return logits

    def zero_computation_experts(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T O"] | None]:
        zero, copy, constant = self._kinds
        return [None] * zero + [x] * copy + [self._constant(x, i) for i in range(constant)]

    def _constant(self, x: Float[Array, "B T D"], i: int) -> Float[Array, "B T O"]:
        """``a_1 x + a_2 c`` with ``a = softmax(W x)``; the share of ``c`` is booked as a bias."""
        reading = self.reading
        logits = matmul_f32_accum(reading.ledger_in("router", x), self.constant_gates[i])
        c = reading.ledger_out("bias", jnp.broadcast_to(self.constants[i].astype(x.dtype), x.shape))
        terms = reading.ledger_in("router", jnp.stack([x, c], axis=-2))
        mixed = reading.rule.mix(jax.nn.softmax(logits, axis=-1).astype(x.dtype), terms)
        return reading.rule.combine(reading.ledger_out("router", mixed))

    def balanceloss(
        self, selected_experts: Int[Array, "B T K"], gate_softmax: Float[Array, "B T R"]
    ) -> Float[Array, ""]:
        """Balance with a weight for each kind of expert (equation 9)."""
        routes = jnp.arange(self.counts.router_outputs)
        factors = jnp.where(routes < self.num_of_experts, 1.0, self.args.tau)
        if self.args.compat:
            factors = jnp.where(routes == 4, 1.3, 1.0)
        return self.balance(as_routing(selected_experts, gate_softmax, gate_softmax), factors=factors)
