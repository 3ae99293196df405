"""The drop-top-k probe: how much worse a model predicts without each token's best experts."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.models import Decoder, FlatDecoder, unflatten
from moejax.program import Program
from moejax.routing import Routing
from moejax.rules import Gates, Reading
from moejax.study.accumulate import accumulate, mean
from moejax.study.accumulators import LossSums, loss_sums, mixtures
from moejax.study.data import Batch, Windows


@dataclass(frozen=True)
class Probe:
    """Mean loss over ``predictions`` next tokens, in nats a token.

    Attributes:
        dropped: experts of each token that were masked, in every mixture layer.
        refill: whether the next best took their place.
        intact: the loss with all experts, on the same tokens.
    """

    dropped: int
    refill: bool
    predictions: int
    loss: float | None
    intact: float | None


def drop_top(lm: LM, windows: Windows, dropped: int, *, refill: bool, progress: bool = False) -> Probe:
    """Mask each token's ``dropped`` best feed-forward experts in all layers, and predict.

    Best are those of the largest absolute weights, as the router sees them once the layers below are masked. The masks
    are gates: ``selectable`` with ``refill``, so that the next best experts run with the weights as if the router had
    selected them; else ``routing_weights``, so that the weights of the rest grow to the same sum. Every layer runs twice, first
    for its routing and then masked.

    Raises:
        MoejaxError: the model has no experts, or so many dropped leave none to go on with.
    """
    check_drop(lm, dropped, refill)
    measure = partial(_measure, lm.flat, dropped=dropped, refill=refill)
    what = f"best {dropped} masked, {'refilled' if refill else 'the rest renormalised'}"
    sums, intact = accumulate(measure, windows, what, progress)
    predictions = int(sums.predictions.sum())
    return Probe(dropped, refill, predictions, *(mean(s.nats.sum(), predictions) for s in (sums, intact)))


def possible_probes(lm: LM, most: int) -> list[tuple[int, bool]]:
    """What :func:`drop_top` can be asked for, up to ``most`` experts: how many, and whether others take their place.

    Raises:
        MoejaxError: so many cannot be dropped in either way.
    """
    found = []
    for dropped in range(1, most + 1):
        ways, refusals = [], []
        for refill in (True, False):
            try:
                check_drop(lm, dropped, refill)
                ways.append((dropped, refill))
            except MoejaxError as error:
                refusals.append(error)
        if not ways:
            raise refusals[0]
        found += ways
    return found


def check_drop(lm: LM, dropped: int, refill: bool) -> None:
    """Whether the probe can be made.

    Raises:
        MoejaxError: it cannot.
    """
    found = mixtures(lm.decoder).get("feed_forward", [])
    if not found:
        raise MoejaxError(f"{lm.name} has no mixture of feed-forward experts to drop from.")
    if dropped < 1:
        raise MoejaxError(f"dropping {dropped} experts is no probe; drop at least 1.")
    for _, experts, slots, _ in found:
        most = min(slots, experts - slots) if refill else slots - 1
        if dropped > most:
            way = "with refill" if refill else "without refill"
            raise MoejaxError(
                f"cannot drop the best {dropped} {way}: a token has {slots} of {experts} experts, so at most {most}."
            )


@partial(Program, static_argnames=("dropped", "refill"))
def _measure(weights: FlatDecoder, batch: Batch, *, dropped: int, refill: bool) -> tuple[LossSums, LossSums]:
    decoder, batch = unflatten(weights), batch._replace(labels=jnp.zeros_like(batch.labels))
    without = loss_sums(decoder, _stream(decoder, batch, dropped, refill), batch, 1)
    return without, loss_sums(decoder, decoder.hidden(batch.tokens, valid=batch.valid).stream, batch, 1)


def _stream(decoder: Decoder, batch: Batch, dropped: int, refill: bool) -> Float[Array, "B T D"]:
    """The residual stream after the last layer, every layer routed on what the masked layers below wrote."""
    x = decoder.embedding[batch.tokens]
    for layer in decoder.layers:
        run = partial(replace(decoder, layers=[layer]).hidden, batch.tokens, valid=batch.valid, embedded=x)
        intact = run()
        routing = intact.routing()[0]
        if routing is None:
            x = intact.stream
            continue
        kept = 1.0 - _best(routing, decoder.config.num_experts, dropped)[None]
        gates = Gates(selectable=kept) if refill else Gates(routing_weights=kept)
        x = run(reading=Reading(gates=gates)).stream
    return x


def _best(routing: Routing, experts: int, count: int) -> Bool[Array, "B T E"]:
    """The ``count`` experts with the largest absolute weights of those that carry something."""
    here = routing.ids[..., None] == jnp.arange(experts)
    size = jnp.where(here, jnp.abs(routing.weights)[..., None], 0).max(-2)
    best = (jax.lax.top_k(size, count)[1][..., None] == jnp.arange(experts)).any(-2)
    return best & (size > 0)
