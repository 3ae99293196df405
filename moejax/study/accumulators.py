"""What a batch adds to the statistics: sums over its tokens, a small pytree on the device."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.models import Config, Decoder, FlatDecoder, Hidden, unflatten
from moejax.program import Program
from moejax.routing import Routing
from moejax.routing import statistics as s
from moejax.study.data import Batch
from moejax.study.outputs import output_similarity

Kind = Literal["feed_forward", "attention"]
KINDS: tuple[Kind, ...] = ("feed_forward", "attention")


class RoutingSums(NamedTuple):
    """Of the mixtures of one kind; L counts those layers only. Entropies in nats, margins in [0, 1].

    Attributes:
        tokens: that count. Those whose router gave NaN do not.
        nan: tokens whose router gave NaN, or infinite weights.
        routed: tokens of which a slot carries something.
        counts, first: slots that each expert filled, and tokens of which it was the first choice.
        overlap, overlap_tokens: sums of :func:`moejax.routing.statistics.layer_iou`, and how many.
        by_label, by_token: ``counts`` by the row's label, and by the token's id if asked for.
        alike, alike_tokens: sums of :func:`moejax.study.outputs.output_similarity`, and of how many, if asked for.
    """

    tokens: Int[Array, " L"]
    nan: Int[Array, " L"]
    routed: Int[Array, " L"]
    router_entropy: Float[Array, " L"]
    router_margin: Float[Array, " L"]
    weight_entropy: Float[Array, " L"]
    weight_margin: Float[Array, " L"]
    counts: Int[Array, "L E"]
    first: Int[Array, "L E"]
    coactivation: Int[Array, "L E E"]
    by_label: Int[Array, "L G E"]
    by_token: Int[Array, "L V E"] | None
    overlap: Float[Array, "L L"]
    overlap_tokens: Int[Array, "L L"]
    alike: Float[Array, " L"] | None = None
    alike_tokens: Int[Array, " L"] | None = None


class LossSums(NamedTuple):
    """Of the next tokens, by label.

    Attributes:
        nats: sum of cross-entropies.
        predictions: how many.
    """

    nats: Float[Array, " G"]
    predictions: Int[Array, " G"]


class Sums(NamedTuple):
    """All that is measured of a batch; ``mixtures`` has those kinds that the model has."""

    loss: LossSums
    mixtures: dict[Kind, RoutingSums]


class MixtureLayer(NamedTuple):
    """A layer's mixture: its experts without null routes, a token's slots, and the outputs of its router."""

    layer: int
    experts: int
    slots: int
    routes: int


def mixtures(decoder: Decoder) -> dict[Kind, list[MixtureLayer]]:
    """The mixtures of each kind that route tokens in a forward pass of the decoder.

    The pass is asked, not the configuration: a registered layer may never ask its experts.
    """
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    hidden = jax.eval_shape(lambda d, tokens: d.hidden(tokens), decoder, one)
    by_kind: dict[Kind, list[MixtureLayer]] = {}
    for kind in KINDS:
        for layer, routing in enumerate(hidden.routing(kind)):
            if routing is not None:
                sizes = decoder.config.blocks[layer].half(kind).sizes
                experts = sizes.num_experts - sizes.num_null
                mixture = MixtureLayer(layer, experts, routing.weights.shape[-1], routing.logits.shape[-1])
                by_kind.setdefault(kind, []).append(mixture)
    return by_kind


def id_space(config: Config, kind: Kind) -> int:
    """Experts that ids of that kind count."""
    return config.num_experts if kind == "feed_forward" else config.num_attention_experts


@partial(Program, static_argnames=("groups", "by_token", "outputs"))
def measure(
    weights: Decoder | FlatDecoder, batch: Batch, *, groups: int, by_token: bool, outputs: bool = False
) -> Sums:
    """Run a batch and sum; ``groups`` is the number of labels, at least one."""
    decoder = unflatten(weights)
    hidden = decoder.hidden(batch.tokens, valid=batch.valid)
    loss = loss_sums(decoder, hidden.stream, batch, groups)
    by_kind: dict[Kind, RoutingSums] = {}
    for kind in KINDS:
        found = [routing for routing in hidden.routing(kind) if routing is not None]
        if found:
            vocabulary = decoder.config.vocab_size if by_token else 0
            by_kind[kind] = routing_sums(found, batch, id_space(decoder.config, kind), groups, vocabulary)
    if outputs and "feed_forward" in by_kind:
        alike, tokens = _alike(decoder, hidden, batch)
        by_kind["feed_forward"] = by_kind["feed_forward"]._replace(alike=alike, alike_tokens=tokens)
    return Sums(loss, by_kind)


def _alike(decoder: Decoder, hidden: Hidden, batch: Batch) -> tuple[Float[Array, " L"], Int[Array, " L"]]:
    sums = []
    for layer, routing in enumerate(hidden.routing()):
        if routing is not None:
            cosines, counted = output_similarity(decoder, hidden, layer, batch)
            counted &= batch.valid & jnp.isfinite(cosines)
            sums.append((jnp.where(counted, cosines, 0).sum(), counted.sum(dtype=jnp.int32)))
    alike, tokens = zip(*sums, strict=True)
    return jnp.stack(alike), jnp.stack(tokens)


def loss_sums(decoder: Decoder, stream: Float[Array, "B T D"], batch: Batch, groups: int) -> LossSums:
    """Cross-entropy in nats of each next token; one row's logits at a time are in memory."""

    def row(of: tuple[Array, Array]) -> Float[Array, " T"]:
        logits = decoder.logits(of[0])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, of[1][:, None], axis=-1)[:, 0]

    nats = jnp.where(batch.predicted, jax.lax.map(row, (stream, batch.targets)), 0).sum(1)
    add = partial(jax.ops.segment_sum, segment_ids=batch.labels, num_segments=groups)
    return LossSums(add(nats), add(batch.predicted.sum(1, dtype=jnp.int32)))


def routing_sums(
    routing: Sequence[Routing], batch: Batch, num_experts: int, groups: int, vocabulary: int = 0
) -> RoutingSums:
    """Sums over the valid tokens of one routing a layer; by token id if there is a ``vocabulary``."""
    found = [_layer(r, batch, num_experts, groups, vocabulary) for r in routing]
    counted = jnp.stack([tokens for _, _, tokens in found])
    iou, both = s.layer_iou(jnp.stack([chosen for _, chosen, _ in found]))
    both &= counted[:, None] & counted[None]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(sums for sums, _, _ in found))
    return RoutingSums(
        **({"by_token": None} | stacked),
        overlap=jnp.where(both, iou, 0).sum((2, 3)),
        overlap_tokens=both.sum((2, 3), dtype=jnp.int32),
    )


@partial(jax.jit, static_argnames=("num_experts", "groups", "vocabulary"))
def _layer(
    routing: Routing, batch: Batch, num_experts: int, groups: int, vocabulary: int
) -> tuple[dict[str, Array], Int[Array, "B T E"], Bool[Array, "B T"]]:
    """One layer's sums, its selections, and the tokens that count."""
    ids, weights = routing.ids, routing.weights
    entropy = s.router_entropy(routing.logits)
    sound = jnp.isfinite(entropy) & jnp.isfinite(weights).all(-1)
    counted = batch.valid & sound
    chosen = jnp.where(counted[..., None], s.selections(ids, weights, num_experts), 0)
    routed = chosen.any(-1)
    total = lambda values, where: jnp.where(where, values, 0).sum()
    by_row = chosen.sum(1)
    sums = {
        "tokens": counted.sum(dtype=jnp.int32),
        "nan": (batch.valid & ~sound).sum(dtype=jnp.int32),
        "routed": routed.sum(dtype=jnp.int32),
        "router_entropy": total(entropy, counted),
        "router_margin": total(s.router_margin(routing.logits), counted),
        "weight_entropy": total(s.weight_entropy(weights), routed),
        "weight_margin": total(s.weight_margin(weights), routed),
        "counts": s.usage(chosen),
        "first": s.usage(s.first_choice(ids, weights, num_experts), counted),
        "coactivation": s.coactivation(chosen),
        "by_label": jax.ops.segment_sum(by_row, batch.labels, num_segments=groups),
    }
    if vocabulary:
        flat = chosen.reshape(-1, num_experts)
        sums["by_token"] = jax.ops.segment_sum(flat, batch.tokens.ravel(), num_segments=vocabulary)
    return sums, chosen, counted
