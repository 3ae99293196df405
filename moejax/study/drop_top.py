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
from moejax.study.data import WindowBatch, Windows


@dataclass(frozen=True)
class Probe:
    """Loss with each token's best experts masked, and without masks.

    Attributes:
        dropped: number of each token's best experts that are masked in every mixture layer.
        refill: True if the next best experts take their place, False if the weights of the rest are renormalised.
        predictions: number of predicted tokens.
        loss: mean loss in nats a token with the masks; ``None`` if it is not finite or nothing is predicted.
        intact: the same without masks, on the same tokens.
    """

    dropped: int
    refill: bool
    predictions: int
    loss: float | None
    intact: float | None


def drop_top(lm: LM, windows: Windows, dropped: int, *, refill: bool, progress: bool = False) -> Probe:
    """Measure the loss with each token's ``dropped`` best feed-forward experts masked in all layers.

    A token's best experts have the largest absolute weights, as routed when the layers below are masked already. The
    masks are gates: with ``refill``, ``selectable`` gates make the router select the next best experts; without it,
    ``routing_weights`` gates scale the weights of the remaining experts to the same sum. Every layer runs twice, once
    to get its routing and once masked.

    Raises:
        MoejaxError: the model has no experts, or too few experts would remain.
    """
    check_drop(lm, dropped, refill)
    measure = partial(_measure, lm.flat, dropped=dropped, refill=refill)
    what = f"best {dropped} masked, {'refilled' if refill else 'the rest renormalised'}"
    sums, intact = accumulate(measure, windows, what, progress)
    predictions = int(sums.predictions.sum())
    return Probe(dropped, refill, predictions, *(mean(s.nats.sum(), predictions) for s in (sums, intact)))


def possible_probes(lm: LM, most: int) -> list[tuple[int, bool]]:
    """Arguments ``(dropped, refill)`` that :func:`drop_top` accepts for this model, for 1 to ``most`` dropped experts.

    Raises:
        MoejaxError: some number of experts can be dropped neither with nor without refill.
    """
    probes = []
    for dropped in range(1, most + 1):
        accepted, refusals = [], []
        for refill in (True, False):
            try:
                check_drop(lm, dropped, refill)
                accepted.append((dropped, refill))
            except MoejaxError as error:
                refusals.append(error)
        if not accepted:
            raise refusals[0]
        probes += accepted
    return probes


def check_drop(lm: LM, dropped: int, refill: bool) -> None:
    """Check that :func:`drop_top` can be run with these arguments.

    Raises:
        MoejaxError: the model has no feed-forward experts, or too few experts would remain.
    """
    sizes = mixtures(lm.decoder).get("feed_forward", [])
    if not sizes:
        raise MoejaxError(f"{lm.name} has no mixture of feed-forward experts to drop from.")
    if dropped < 1:
        raise MoejaxError(f"cannot drop {dropped} experts; drop at least 1.")
    for _, experts, slots, _ in sizes:
        most = min(slots, experts - slots) if refill else slots - 1
        if dropped > most:
            way = "with refill" if refill else "without refill"
            raise MoejaxError(
                f"cannot drop the best {dropped} {way}: a token has {slots} of {experts} experts, so at most {most}."
            )


@partial(Program, static_argnames=("dropped", "refill"))
def _measure(weights: FlatDecoder, batch: WindowBatch, *, dropped: int, refill: bool) -> tuple[LossSums, LossSums]:
    """The loss of a batch with masks and without."""
    decoder, batch = unflatten(weights), batch._replace(labels=jnp.zeros_like(batch.labels))
    without = loss_sums(decoder, _stream(decoder, batch, dropped, refill), batch, 1)
    return without, loss_sums(decoder, decoder.hidden(batch.tokens, valid=batch.valid).stream, batch, 1)


def _stream(decoder: Decoder, batch: WindowBatch, dropped: int, refill: bool) -> Float[Array, "B T D"]:
    """The residual stream after the last layer; every layer is masked, and reads the output of masked layers."""
    x = decoder.embed(batch.tokens)
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
    """True for the ``count`` experts with the largest absolute weights; experts of weight zero are never among them."""
    selected = routing.ids[..., None] == jnp.arange(experts)
    size = jnp.where(selected, jnp.abs(routing.weights)[..., None], 0).max(-2)
    best = (jax.lax.top_k(size, count)[1][..., None] == jnp.arange(experts)).any(-2)
    return best & (size > 0)
