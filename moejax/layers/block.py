"""One decoder layer: attention and feed-forward, each on a normalised copy of the residual stream."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from moejax.layers.attention.grouped_query import Attention, AttentionConfig, Context, KeyValue
from moejax.layers.attention.mixture import MixtureAttention, MixtureAttentionConfig
from moejax.layers.feed_forward.dense import MLP, MLPConfig
from moejax.layers.feed_forward.mixture import MoE, MoEConfig
from moejax.layers.feed_forward.moe_layer import MoeLayer, Ran
from moejax.layers.feed_forward.registry import RegisteredConfig
from moejax.layers.norm import RMSNorm
from moejax.routing import Routing
from moejax.rules import Reading


@dataclass(frozen=True)
class BlockConfig:
    """Architecture of one layer."""

    attention: AttentionConfig | MixtureAttentionConfig
    feed_forward: MoEConfig | RegisteredConfig | MLPConfig
    norm_eps: float

    @property
    def mixture(self) -> MoEConfig | RegisteredConfig | None:
        """The feed-forward part, if it is a mixture of experts."""
        return None if isinstance(self.feed_forward, MLPConfig) else self.feed_forward


class Routes(NamedTuple):
    """What a layer's mixtures tell of themselves; ``None`` for a part that is no mixture.

    Attributes:
        attention, feed_forward: where they sent each token.
        ran: what else a registered layer computed.
    """

    attention: Routing | None
    feed_forward: Routing | None
    ran: Ran | None = None


@nnx.dataclass
class Block(nnx.Module):
    """Pre-norm residual block."""

    attention_norm: RMSNorm = nnx.data()
    attention: Attention | MixtureAttention = nnx.data()
    feed_forward_norm: RMSNorm = nnx.data()
    feed_forward: MoE | MoeLayer | MLP = nnx.data()

    @classmethod
    def init(cls, key: PRNGKeyArray, config: BlockConfig, dtype: DTypeLike) -> Self:
        """Random weights."""
        c, (k1, k2) = config, jax.random.split(key)
        dim = c.attention.model_dim
        return cls(
            RMSNorm.init(dim, c.norm_eps, dtype),
            MixtureAttention.init(k1, c.attention, dtype)
            if isinstance(c.attention, MixtureAttentionConfig)
            else Attention.init(k1, c.attention, dtype),
            RMSNorm.init(dim, c.norm_eps, dtype),
            _feed_forward(k2, c.feed_forward, dtype),
        )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KeyValue | None, reading: Reading
    ) -> tuple[Float[Array, "B T D"], KeyValue, Routes]:
        """``reading`` is that of this layer."""
        x = reading.tap("stream", reading.gate("tokens", x))
        normed = reading.tap("attention_norm", self.attention_norm(x, reading))
        attended, stored, attention_routing = self.attention(normed, context, cache, reading)
        x = reading.rule.add(x, reading.tap("attention", reading.gate("attention", attended)))
        x = reading.tap("middle", x)
        normed = reading.tap("feed_forward_norm", self.feed_forward_norm(x, reading))
        routing = ran = None
        if isinstance(self.feed_forward, MLP):
            y = self.feed_forward(normed, reading)
        elif isinstance(self.feed_forward, MoE):
            y, routing = self.feed_forward(normed, reading)
        else:
            c = context
            y, ran = self.feed_forward.run(normed, reading=reading, mask=c.valid, previous=c.previous, key=c.key)
            routing, ran = ran.routing, ran._replace(routing=None)
        y = reading.tap("feed_forward", reading.gate("feed_forward", y))
        return reading.rule.add(x, y), stored, Routes(attention_routing, routing, ran)


def _feed_forward(
    key: PRNGKeyArray, config: MoEConfig | RegisteredConfig | MLPConfig, dtype: DTypeLike
) -> MoE | MoeLayer | MLP:
    if isinstance(config, MLPConfig):
        return MLP.init(key, config, dtype)
    if isinstance(config, MoEConfig):
        return MoE.init(key, config, dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), config.init(key))
