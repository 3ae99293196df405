"""The result of ``explain``."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Int

from moejax.errors import MoejaxError
from moejax.relevance.ledger import Ledger
from moejax.report.schema import SCHEMA, RelevanceReport


class Candidate(NamedTuple):
    """A likely next token: its text, id, logit and probability."""

    token: str
    id: int
    logit: float
    probability: float


@dataclass(frozen=True, repr=False)
class ExpertRelevance:
    """Relevance of the experts of one kind, feed-forward or attention.

    Attributes:
        slots: relevance of each routed slot's weighted output.
        ids, weights: expert and routing weight of each slot; id -1 in layers that are no mixture.
        count: number E of experts of a layer.
    """

    slots: Float[np.ndarray, "N L T K"]
    ids: Int[np.ndarray, "L T K"]
    weights: Float[np.ndarray, "L T K"]
    count: int

    def by_expert(self, how: str = "sum") -> Float[np.ndarray, "N L E"]:
        """Sum the relevance of each expert of each layer over the tokens routed to it.

        Args:
            how: ``"sum"`` (signed, as the ledger counts), ``"absolute"`` (sum of absolute values), ``"positive"`` (sum
                of positive parts), ``"count"`` (number of slots whose weight is not zero), ``"mean"`` (sum over
                count). They rank experts differently, since frequent experts collect more relevance.

        Raises:
            MoejaxError: ``how`` is another word.
        """
        ways = {
            "sum": self.slots,
            "absolute": np.abs(self.slots),
            "positive": self.slots.clip(0),
            "count": np.broadcast_to(self.weights != 0, self.slots.shape).astype(self.slots.dtype),
        }
        if how == "mean":
            return self.by_expert() / self.by_expert("count").clip(1)
        if how not in ways:
            raise MoejaxError(f"how={how!r} is unknown; choose from {', '.join([*ways, 'mean'])}.")
        return self._scatter(ways[how], 2)

    def by_token(self) -> Float[np.ndarray, "N L T E"]:
        """Return the relevance of each expert for each token; zero where it was not selected."""
        return self._scatter(self.slots, 3)

    def _scatter(self, slots: Float[np.ndarray, "N L T K"], kept: int) -> Float[np.ndarray, "N L *t E"]:
        """Sum by expert over all axes but the first ``kept``; two slots of a token may have one expert."""
        shape, places = slots.shape[:kept], self.count + 1
        rows = np.arange(math.prod(shape)).reshape(*shape, *[1] * (slots.ndim - kept))
        # id -1 adds to the last place, which belongs to no expert
        where = rows * places + self.ids % places
        sums = np.bincount(where.ravel(), slots.ravel(), rows.size * places)
        return sums.reshape(*shape, places)[..., :-1].astype(slots.dtype)

    def drop_renormalise(self) -> Float[np.ndarray, "N L T K"]:
        """Estimate to first order what the target loses if a slot's expert is dropped and the other weights make up.

        The estimate is ``(R_k - w_k R) / (1 - w_k)`` with ``R`` the relevance of all slots of the token and ``w`` the
        weights over their sum. Nothing makes up for a token's only expert; its score is its relevance.
        """
        fraction = self._fractions
        total = self.slots.sum(-1, keepdims=True)
        scores = (self.slots - fraction * total) / np.where(fraction < 1, 1 - fraction, 1)
        return np.where(fraction < 1, scores, self.slots)

    def advantage(self) -> Float[np.ndarray, "N L T K"]:
        """Compare a slot's expert, before its weight, with the mixture that it belongs to.

        The result ``R_k / w_k - R / sum w`` is positive for experts that are better for the target than the mixture;
        weighted by ``w`` it sums to zero.
        """
        weights = np.where(self.weights == 0, 1, self.weights)
        mixture = self.slots.sum(-1, keepdims=True) / np.where(self._sum == 0, 1, self._sum)
        return np.where(self.weights == 0, 0, self.slots / weights - mixture)

    def sensitivity(self) -> Float[np.ndarray, "N L T K"]:
        """Differentiate the target by a selected expert's router logit, with all else held constant.

        The result is ``R_k - w_k R``, where ``w`` are the routing weights themselves, a softmax over the selected
        experts or over all experts.
        """
        return self.slots - self.weights * self.slots.sum(-1, keepdims=True)

    @property
    def _sum(self) -> np.ndarray:
        return self.weights.sum(-1, keepdims=True)

    @property
    def _fractions(self) -> np.ndarray:
        """Weights over the sum of the token's weights."""
        return self.weights / np.where(self._sum == 0, 1, self._sum)

    def __repr__(self) -> str:
        """Sizes."""
        n, layers, tokens, slots = self.slots.shape
        return f"ExpertRelevance(N={n}, L={layers}, T={tokens}, K={slots}, E={self.count})"


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The part that relevance and the scores of other methods share: targets, tokens, and feed-forward experts.

    Attributes:
        token_ids, pieces: the input sequence and each token's text.
        labels: name of each target.
        positions: the token whose successor each target predicts.
    """

    token_ids: Int[np.ndarray, " T"]
    pieces: list[str]
    labels: list[str]
    positions: Int[np.ndarray, " N"]

    @property
    def experts(self) -> Float[np.ndarray, "N L T K"]:
        """Relevance or score of each routed slot of the feed-forward layers."""
        return self._mixture.slots

    @property
    def expert_ids(self) -> Int[np.ndarray, "L T K"]:
        """The expert of each routed slot of the feed-forward layers; -1 in layers without experts."""
        return self._mixture.ids

    def by_expert(self, how: str = "sum") -> Float[np.ndarray, "N L E"]:
        """Sum over the tokens routed to each feed-forward expert (:meth:`ExpertRelevance.by_expert`)."""
        return self._mixture.by_expert(how)

    @property
    def _mixture(self) -> ExpertRelevance:
        """The experts of the feed-forward layers."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Relevance(Attribution):
    """Relevance of everything that has a gate, for N targets, signed, in units of the target's logit.

    Without mixtures, ``experts`` and ``expert_ids`` are arrays with ``K = 0``.

    Attributes:
        model, rule, prompt: name of the model, the rule, and the text of the sequence.
        token_ids, pieces, labels, positions: see :class:`Attribution`.
        layers: relevance of the residual stream entering each layer; last, the final norm.
        heads: relevance of each attention head's output.
        feed_forward: relevance of the experts of feed-forward layers; ``None`` if no layer has any.
        attention: relevance of attention experts; ``None`` in families without them.
        shared: relevance of the shared expert's gated output, for each token; ``None`` in families without it.
        vectors: relevance of every number at the nodes that were asked for.
        ledger: the explained value, the relevance of the input, and the leaks between them.
        candidates: the most likely next tokens at each target's position.
    """

    model: str
    rule: str
    prompt: str
    layers: Float[np.ndarray, "N L1 T"]
    heads: Float[np.ndarray, "N L T H"]
    feed_forward: ExpertRelevance | None
    attention: ExpertRelevance | None
    shared: Float[np.ndarray, "N L T 1"] | None
    vectors: dict[str, np.ndarray]
    ledger: Ledger
    candidates: list[list[Candidate]]

    @property
    def tokens(self) -> Float[np.ndarray, "N T"]:
        """Relevance of each input token's embedding."""
        return self.layers[:, 0]

    @property
    def expert_weights(self) -> Float[np.ndarray, "L T K"]:
        """The routing weight of each routed slot of the feed-forward layers."""
        return self._mixture.weights

    @property
    def num_experts(self) -> int:
        """Number E of experts of a feed-forward layer."""
        return self._mixture.count

    def drop_renormalise(self) -> Float[np.ndarray, "N L T K"]:
        """Estimate the loss if a feed-forward expert is dropped (:meth:`ExpertRelevance.drop_renormalise`)."""
        return self._mixture.drop_renormalise()

    def neurons(self, layer: int, expert: int) -> Float[np.ndarray, "N T F"]:
        """Return the relevance of an expert's hidden units for each token; zero where it was not selected.

        Raises:
            MoejaxError: the layer's neurons were not read (``explain(.., nodes=["neurons.LAYER"])``).
        """
        node = f"neurons.{layer}"
        if node not in self.vectors:
            raise MoejaxError(f"neurons of layer {layer} were not read; explain with nodes=[{node!r}].")
        chosen = (self.expert_ids[layer] == expert)[..., None]
        return np.where(chosen, self.vectors[node], 0).sum(2)

    @property
    def _mixture(self) -> ExpertRelevance:
        """The experts; without any, arrays of no slots, so that callers need no special case."""
        if self.feed_forward is not None:
            return self.feed_forward
        shape = (*self.heads.shape[:-1], 0)
        weights = np.zeros(shape[1:], self.heads.dtype)
        return ExpertRelevance(np.zeros(shape, self.heads.dtype), weights.astype(np.int32), weights, 0)

    def to_dict(self) -> RelevanceReport:
        """Return the result as plain data, for JSON and for the reports."""
        ledger, residual = self.ledger, self.ledger.residual
        targets = [
            {
                "label": self.labels[n],
                "position": int(self.positions[n]),
                "value": float(ledger.target[n]),
                "candidates": [c._asdict() for c in self.candidates[n]],
                "tokens": self.tokens[n].tolist(),
                "layers": self.layers[n].tolist(),
                "experts": self.experts[n].tolist(),
                "heads": self.heads[n].tolist(),
                "ledger": {
                    "target": float(ledger.target[n]),
                    "tokens": float(ledger.tokens[n]),
                    "leaks": {name: leak[n].tolist() for name, leak in ledger.leaks.items()},
                    "residual": float(residual[n]),
                },
            }
            for n in range(len(self.labels))
        ]
        report = {
            "schema": SCHEMA,
            "model": self.model,
            "rule": self.rule,
            "prompt": self.prompt,
            "tokens": self.pieces,
            "token_ids": self.token_ids.tolist(),
            "num_experts": self._mixture.count,
            "expert_ids": self.expert_ids.tolist(),
            "expert_weights": self.expert_weights.tolist(),
            "targets": targets,
        }
        return cast(RelevanceReport, report)

    def show(self, target: int = 0, plot: str | None = None, **options: Any) -> Any:
        """Show a target: as a figure, which displays itself, in a notebook, and as coloured text in a terminal.

        Args:
            target: index of the target.
            plot: the name of a plot, a key of ``report.PLOTS``; it is drawn in a terminal too, as a figure to save.
            options: further arguments of the plot.

        Raises:
            MoejaxError: there is no such plot; the message lists all names.
        """
        from moejax import report

        if plot is not None:
            return report.plot(plot, self.to_dict(), target, **options)
        if _in_notebook():
            return report.figure(self.to_dict(), target)
        return report.render(self.to_dict())

    def save_html(self, path: str | Path) -> None:
        """Write the report as a self-contained page."""
        from moejax import report

        Path(path).write_text(report.to_html(self.to_dict()), encoding="utf-8")

    def __repr__(self) -> str:
        """Model, rule, targets, sizes and the ledger's largest residual."""
        layers, tokens, slots = self.expert_ids.shape
        residual = np.abs(self.ledger.residual).max(initial=0.0)
        return (
            f"Relevance(model={self.model!r}, rule={self.rule}, targets={self.labels}, "
            f"T={tokens}, L={layers}, K={slots}, residual={residual:.1e})"
        )

    def _repr_html_(self) -> str:
        """Format a small table for notebooks: tokens coloured by relevance, and the top experts of each layer."""
        from moejax.report.notebook_table import notebook_table

        return notebook_table(self.to_dict())


def _in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel."""
    import sys

    shell = sys.modules.get("IPython")
    return bool(shell and shell.get_ipython() and "IPKernelApp" in shell.get_ipython().config)
