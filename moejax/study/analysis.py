"""``analyse``: the routing statistics of a model over data, beside its loss on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.study.accumulate import accumulate, mean
from moejax.study.accumulators import Kind, LossSums, id_space, measure, mixtures
from moejax.study.compare import LayerChange, compare
from moejax.study.data import Windows
from moejax.study.drop_top import Probe, drop_top, possible_probes
from moejax.study.result import RoutingStatistics, plain, routing_statistics
from moejax.study.similarity import similarities

_NUMBERS = 1 << 26
"""Counts by token id that are kept without being asked for."""


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyse` found.

    Attributes:
        tokens: that were read, of ``tokens_of_data``.
        length: tokens of the longest window.
        loss: mean cross-entropy of the next token in nats, every window seen by itself; ``None`` if nothing was
            predicted, or if it is not finite.
        predictions: next tokens that were predicted.
        labels, label_loss: names of the data's labels, and the loss on each.
        mixtures: the statistics, by kind of mixture.
        changes: the comparison with the checkpoint named ``against``.
        probes: of the loss without the best experts.
    """

    model: str
    tokens: int
    tokens_of_data: int
    length: int
    loss: float | None
    predictions: int
    labels: tuple[str, ...]
    label_loss: tuple[float | None, ...]
    mixtures: dict[Kind, RoutingStatistics]
    against: str | None = None
    changes: dict[Kind, list[LayerChange]] | None = None
    probes: Sequence[Probe] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return plain(self)


def analyse(
    lm: LM,
    windows: Windows,
    *,
    against: LM | None = None,
    by_token: bool | None = None,
    outputs: bool = False,
    drop: int = 0,
    probe_tokens: int = 4096,
    progress: bool = False,
) -> Analysis:
    """Routing statistics of all mixtures of a model over data; sums stay on the device, tokens are not kept.

    Args:
        against: another checkpoint of the same model, to compare with on the same data.
        by_token: count by token id, for token specialisation; by default where that takes at most 2^26 numbers.
        outputs: also measure how alike the outputs of a token's feed-forward experts are; every layer runs twice.
        drop: mask each token's best 1, 2, .. up to so many experts (:func:`moejax.study.drop_top`), in all ways that
            leave some.
        probe_tokens: tokens of the sample on which that is done, drawn as ``windows`` are.
        progress: show a bar on stderr.

    Raises:
        MoejaxError: the model has no mixtures, windows are longer than its context, ``against`` does not fit,
            or so many experts cannot be dropped.
    """
    config = lm.config
    sizes = mixtures(lm.decoder)
    if not sizes:
        raise MoejaxError(f"{lm.name} has no mixture of experts: there is no routing to analyse.")
    if windows.length > config.max_positions:
        raise MoejaxError(
            f"windows of {windows.length} tokens, but {lm.name} is made for {config.max_positions}: ask for fewer."
        )
    if by_token is None:
        per_id = sum(len(found) * id_space(config, kind) for kind, found in sizes.items())
        by_token = per_id * config.vocab_size <= _NUMBERS
    probes = possible_probes(lm, drop)
    sample = replace(windows, limit=min(probe_tokens, windows.limit or probe_tokens))
    names = windows.documents.names
    changes = None if against is None else compare(lm, against, windows, progress=progress)
    run = partial(measure, lm.flat, groups=max(1, len(names)), by_token=by_token, outputs=outputs)
    sums = accumulate(run, windows, "routing", progress)
    statistics: dict[Kind, RoutingStatistics] = {
        kind: routing_statistics(found, sums.mixtures[kind], bool(names), similarities(lm.decoder, kind))
        for kind, found in sizes.items()
    }
    return Analysis(
        lm.name,
        windows.num_tokens,
        windows.documents.num_tokens,
        windows.length,
        mean(sums.loss.nats.sum(), sums.loss.predictions.sum()),
        int(sums.loss.predictions.sum()),
        names,
        _by_label(sums.loss) if names else (),
        statistics,
        against and against.name,
        changes,
        [drop_top(lm, sample, dropped, refill=refill, progress=progress) for dropped, refill in probes],
    )


def _by_label(loss: LossSums) -> tuple[float | None, ...]:
    return tuple(map(mean, loss.nats, loss.predictions))
