"""``analyse``: routing statistics and loss of a model over a data set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.report.schema import SCHEMA, RoutingReport
from moejax.study.accumulate import accumulate, mean
from moejax.study.accumulators import LossSums, MixtureKind, MixtureSizes, id_space, measure, mixtures
from moejax.study.compare import LayerChange, compare
from moejax.study.data import Windows
from moejax.study.drop_top import Probe, drop_top, possible_probes
from moejax.study.result import RoutingStatistics, plain, routing_statistics
from moejax.study.similarity import similarities

_MAX_COUNTS = 1 << 26
"""Largest number of counts by token id that are kept by default."""


@dataclass(frozen=True)
class Analysis:
    """The result of :func:`analyse`.

    Attributes:
        model: name of the model.
        tokens: tokens that were read.
        tokens_of_data: tokens of the whole data set.
        length: tokens of the longest window.
        loss: mean cross-entropy of the next token in nats, without context from other windows; ``None`` if nothing was
            predicted or the loss is not finite.
        predictions: number of predicted tokens.
        labels: names of the data's labels.
        label_loss: the loss on each label.
        mixtures: the statistics, by kind of mixture.
        against: name of the checkpoint that the model was compared with.
        changes: the result of that comparison, by kind of mixture.
        probes: losses with the best experts masked.
    """

    model: str
    tokens: int
    tokens_of_data: int
    length: int
    loss: float | None
    predictions: int
    labels: tuple[str, ...]
    label_loss: tuple[float | None, ...]
    mixtures: dict[MixtureKind, RoutingStatistics]
    against: str | None = None
    changes: dict[MixtureKind, list[LayerChange]] | None = None
    probes: Sequence[Probe] = ()

    def to_dict(self) -> RoutingReport:
        """Plain data for JSON, and for the tables and plots of ``moejax.report``."""
        return cast(RoutingReport, {"schema": SCHEMA} | plain(self))


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
    """Routing statistics and loss of a model over data.

    Sums accumulate on the device; no token's routing is stored.

    Args:
        against: another checkpoint of the same model, to compare with on the same data.
        by_token: count by token id, for token specialisation; by default if that takes at most 2^26 counts.
        outputs: also measure the similarity of the outputs of a token's feed-forward experts; every layer runs twice.
        drop: mask each token's best 1, 2, .. ``drop`` experts (:func:`moejax.study.drop_top`), with and without refill
            where enough experts remain.
        probe_tokens: size in tokens of the sample for ``drop``, drawn at random with the seed of ``windows``.
        progress: show a bar on stderr.

    Raises:
        MoejaxError: the model has no mixtures, windows are longer than its context, ``against`` is not a checkpoint of
            the same model, or ``drop`` experts cannot be dropped.
    """
    config = lm.config
    sizes = _sizes(lm, windows)
    if by_token is None:
        per_id = sum(len(layers) * id_space(config, kind) for kind, layers in sizes.items())
        by_token = per_id * config.vocab_size <= _MAX_COUNTS
    probes = possible_probes(lm, drop)
    sample = replace(windows, limit=min(probe_tokens, windows.limit or probe_tokens))
    names = windows.documents.names
    changes = None if against is None else compare(lm, against, windows, progress=progress)
    run = partial(measure, lm.flat, groups=max(1, len(names)), by_token=by_token, outputs=outputs)
    sums = accumulate(run, windows, "routing", progress)
    statistics: dict[MixtureKind, RoutingStatistics] = {
        kind: routing_statistics(layers, sums.mixtures[kind], bool(names), similarities(lm.decoder, kind))
        for kind, layers in sizes.items()
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


def _sizes(lm: LM, windows: Windows) -> dict[MixtureKind, list[MixtureSizes]]:
    """The sizes of the model's mixtures.

    Raises:
        MoejaxError: the model has no mixtures, or windows are longer than its context.
    """
    sizes = mixtures(lm.decoder)
    if not sizes:
        raise MoejaxError(f"{lm.name} has no mixture of experts: there is no routing to analyse.")
    limit = lm.config.max_positions
    if windows.length > limit:
        raise MoejaxError(
            f"windows of {windows.length} tokens are too long: {lm.name} is made for {limit}. Use shorter windows."
        )
    return sizes


def _by_label(loss: LossSums) -> tuple[float | None, ...]:
    return tuple(map(mean, loss.nats, loss.predictions))
