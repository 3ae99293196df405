"""One decoder layer: attention and feed-forward, each on a normalised copy of the residual stream."""

from flax import nnx
from jaxtyping import Array, Float

from moejax.layers.attention import Attention, Context, KeyValue
from moejax.layers.moe import MoE
from moejax.layers.norm import RMSNorm
from moejax.routing import Routing
from moejax.rules import Reading


@nnx.dataclass
class Block(nnx.Module):
    """Pre-norm residual block."""

    attention_norm: RMSNorm = nnx.data()
    attention: Attention = nnx.data()
    moe_norm: RMSNorm = nnx.data()
    moe: MoE = nnx.data()

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KeyValue | None, reading: Reading
    ) -> tuple[Float[Array, "B T D"], KeyValue, Routing]:
        """``reading`` is that of this layer."""
        x = reading.gate("tokens", x)
        attended, cache = self.attention(self.attention_norm(x, reading), context, cache, reading)
        x = reading.rule.add(x, attended)
        mixed, routing = self.moe(self.moe_norm(x, reading), reading)
        return reading.rule.add(x, mixed), cache, routing
