"""The loss of a decoder on text: cross-entropy and the routers' auxiliary losses."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.models import Decoder
from moejax.routing import balance_loss, z_loss


@dataclass(frozen=True)
class LossWeights:
    """Weights of the auxiliary losses, each averaged over layers."""

    balance: float = 0.01
    z: float = 0.001


def language_model_loss(
    decoder: Decoder, windows: Int[Array, "B T1"], weights: LossWeights
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy in nats of predicting each next token, plus weighted auxiliary losses.

    Also returns the parts: ``cross_entropy``, ``balance``, ``z`` and ``load`` (share of slots, ``[L E]``; only layers
    with experts count). Of a dense model the auxiliary losses are zero.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    hidden = decoder.hidden(inputs)
    logits = decoder.logits(hidden.stream)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = (jax.nn.logsumexp(logits, axis=-1) - picked).mean()
    routing = [r.feed_forward for r in hidden.routing if r.feed_forward is not None]
    balance, z, load = jnp.zeros(()), jnp.zeros(()), jnp.zeros((0, 0))
    if routing:
        balance = jnp.stack([balance_loss(r) for r in routing]).mean()
        z = jnp.stack([z_loss(r) for r in routing]).mean()
        experts = jnp.arange(decoder.config.num_experts)
        load = jnp.stack([(r.ids[..., None] == experts).mean((0, 1, 2)) for r in routing])
    total = cross_entropy + weights.balance * balance + weights.z * z
    return total, {"cross_entropy": cross_entropy, "balance": balance, "z": z, "load": load}
