"""The loss of a decoder on text: cross-entropy and the auxiliary losses of its mixtures."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moejax.layers import Aux
from moejax.models import Decoder
from moejax.routing import Routing, balance_loss, z_loss

Parts = dict[str, Array]


@dataclass(frozen=True)
class LossWeights:
    """How auxiliary losses enter the total.

    Attributes:
        balance, z: weights for mixtures without weights of their own: those of published families, and of attention
            experts. A registered layer weights its losses itself.
        reduce: the mean of the layers' losses (LibMoE's vision stack), or their sum (its language stack).
    """

    balance: float = 0.01
    z: float = 0.001
    reduce: Literal["mean", "sum"] = "mean"


def cross_entropy(
    decoder: Decoder, stream: Float[Array, "B T D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Mean over unmasked targets of the nats that predicting them takes; zero without any."""
    logits = decoder.logits(stream)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return nats.mean() if mask is None else jnp.where(mask, nats, 0).sum() / jnp.maximum(mask.sum(), 1)


def language_model_loss(
    decoder: Decoder, windows: Int[Array, "B T1"], weights: LossWeights, key: PRNGKeyArray | None = None
) -> tuple[Float[Array, ""], Parts]:
    """Mean cross-entropy in nats of predicting each next token, plus the weighted auxiliary losses of the mixtures.

    Also returns the parts: ``cross_entropy`` and ``auxiliary`` (what was added), and for the layers that are mixtures,
    ``[L]`` each, ``balance_loss``, ``router_z_loss`` and whatever else a registered layer reports; ``load``, each
    expert's share of the slots that carry something ``[L E]``; and ``nonfinite``, router logits that are no numbers
    ``[L]``. For those that have attention experts, ``attention_balance_loss`` and ``attention_router_z_loss``. A dense
    model has no such parts.

    Args:
        key: the step's randomness, for layers that have some.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    hidden = decoder.hidden(inputs, key=key)
    nats = cross_entropy(decoder, hidden.stream, targets)
    attention = [_mixture_loss(aux.attention, weights, "attention_") for aux in hidden.aux]
    feed_forward = [_mixture_loss(aux.feed_forward, weights) for aux in hidden.aux]
    losses = [_total(*pair) for pair in zip(attention, feed_forward, strict=True)]
    weighted = [loss for loss in losses if loss is not None]
    auxiliary = jnp.stack(weighted).mean() if weighted else jnp.zeros(())
    if weights.reduce == "sum":
        auxiliary = auxiliary * len(weighted)
    routings = [r for r, mixture in zip(hidden.routing(), feed_forward, strict=True) if mixture is not None]
    parts: Parts = {"cross_entropy": nats, "auxiliary": auxiliary}
    if routings:
        experts = decoder.config.num_experts
        parts["load"] = jnp.stack([expert_load(r, experts) for r in routings])
        bad = [jnp.zeros((), int) if r is None else (~jnp.isfinite(r.logits)).sum() for r in routings]
        parts["nonfinite"] = jnp.stack(bad)
    # the two kinds of mixtures may stand in different layers
    for kind in (attention, feed_forward):
        infos = [mixture.info for mixture in kind if mixture is not None]
        shared = [name for name in (infos[0] if infos else ()) if all(name in info for info in infos)]
        parts |= {name: jnp.stack([info[name] for info in infos]) for name in shared}
    return nats + auxiliary, jax.tree.map(jax.lax.stop_gradient, parts)


class _MixtureLoss(NamedTuple):
    """A mixture's auxiliary loss, weighted, and the numbers it reports."""

    loss: Float[Array, ""]
    info: Parts


def _mixture_loss(aux: Aux, weights: LossWeights, prefix: str = "") -> _MixtureLoss | None:
    """The loss that a part of a layer told, or, where it leaves the weighting to us, its balance and z-loss.

    ``None`` for a part that is no mixture.
    """
    if aux.loss is not None:
        return _MixtureLoss(aux.loss, {name: value for name, value in aux.info.items() if value.ndim == 0})
    if aux.routing is None:
        return None
    balance, z = balance_loss(aux.routing), z_loss(aux.routing)
    info = {f"{prefix}balance_loss": balance, f"{prefix}router_z_loss": z}
    return _MixtureLoss(weights.balance * balance + weights.z * z, info)


def _total(*mixtures: _MixtureLoss | None) -> Float[Array, ""] | None:
    losses = [mixture.loss for mixture in mixtures if mixture is not None]
    return sum(losses[1:], losses[0]) if losses else None


def expert_load(routing: Routing | None, experts: int) -> Float[Array, " E"]:
    """Each expert's share of the slots that carry something; they sum to one, or are zeros if there is no such slot.

    So they are for a registered layer that never asked its experts, which has no routing.
    """
    if routing is None:
        return jnp.zeros(experts)
    carries = (routing.weights != 0)[..., None]
    slots = jnp.where(carries, routing.ids[..., None] == jnp.arange(experts), False)
    counts = slots.sum(range(slots.ndim - 1)).astype(jnp.float32)
    return counts / jnp.maximum(counts.sum(), 1)
