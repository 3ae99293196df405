"""The answer of ``explain``."""

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
    """A likely next token."""

    token: str
    id: int
    logit: float
    probability: float


@dataclass(frozen=True)
class ExpertRelevance:
    """Relevance of the experts of one kind, feed-forward or attention.

    Attributes:
        slots: relevance of each routed slot's weighted output.
        ids, weights: the routing behind the slots; id -1 in layers that are no mixture.
        count: experts of a layer.
    """

    slots: Float[np.ndarray, "N L T K"]
    ids: Int[np.ndarray, "L T K"]
    weights: Float[np.ndarray, "L T K"]
    count: int

    def by_expert(self, how: str = "sum") -> Float[np.ndarray, "N L E"]:
        """Relevance of each expert of each layer over the tokens routed to it.

        Args:
            how: ``"sum"`` (signed, as the ledger counts), ``"absolute"`` (sum of absolute values), ``"positive"`` (of
                positive parts), ``"count"`` (slots whose weight is not zero), ``"mean"`` (sum over count). They rank
                experts differently, since frequent experts collect more.

        Raises:
            MoejaxError: another word.
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
        """Relevance of each expert for each token; zero where it was not selected."""
        return self._scatter(self.slots, 3)

    def _scatter(self, slots: Float[np.ndarray, "N L T K"], kept: int) -> Float[np.ndarray, "N L *t E"]:
        """Sums by expert over all axes but the first ``kept``; two slots of a token may have one expert."""
        shape, places = slots.shape[:kept], self.count + 1
        rows = np.arange(math.prod(shape)).reshape(*shape, *[1] * (slots.ndim - kept))
        # id -1 adds to the last place, which no expert has
        where = rows * places + self.ids % places
        sums = np.bincount(where.ravel(), slots.ravel(), rows.size * places)
        return sums.reshape(*shape, places)[..., :-1].astype(slots.dtype)

    def drop_renormalise(self) -> Float[np.ndarray, "N L T K"]:
        """What the target loses, to first order, if a slot's expert is dropped and the others' weights grow to make up.

        ``(R_k - w_k R) / (1 - w_k)`` with ``R`` the relevance of all slots of the token and ``w`` the weights over
        their sum. A token's only expert cannot be made up for; its score is its relevance.
        """
        share = self._share
        total = self.slots.sum(-1, keepdims=True)
        return np.where(share < 1, (self.slots - share * total) / np.where(share < 1, 1 - share, 1), self.slots)

    def advantage(self) -> Float[np.ndarray, "N L T K"]:
        """How much better a slot's expert is for the target than the mixture it sits in, before its weight.

        ``R_k / w_k - R / sum w``; weighted by ``w`` it sums to zero.
        """
        weights = np.where(self.weights == 0, 1, self.weights)
        mixture = self.slots.sum(-1, keepdims=True) / np.where(self._sum == 0, 1, self._sum)
        return np.where(self.weights == 0, 0, self.slots / weights - mixture)

    def sensitivity(self) -> Float[np.ndarray, "N L T K"]:
        """Derivative of the target by a selected expert's router logit, the other things being equal.

        ``R_k - w_k R``, where ``w`` are the weights as they are: softmax over the selected experts or over all.
        """
        return self.slots - self.weights * self.slots.sum(-1, keepdims=True)

    @property
    def _sum(self) -> np.ndarray:
        return self.weights.sum(-1, keepdims=True)

    @property
    def _share(self) -> np.ndarray:
        return self.weights / np.where(self._sum == 0, 1, self._sum)


@dataclass(frozen=True)
class Relevance:
    """Relevance of N targets for everything that was gated, signed, in units of the target's logit.

    Attributes:
        model, rule, prompt: what was explained, how, and the text of the sequence.
        token_ids, pieces: the input sequence and each token's text.
        labels: what each target is.
        positions: the token whose successor each target predicts.
        layers: relevance of the residual stream entering each layer; last, the final norm.
        heads: relevance of each attention head's output.
        feed_forward: relevance of the experts of feed-forward layers; ``None`` if no layer has any.
        attention: relevance of attention experts; ``None`` in families without them.
        shared: relevance of the shared expert's gated output, for each token; ``None`` in families without it.
        vectors: relevance of every number at the nodes that were asked for.
        ledger: the books.
        candidates: the most likely next tokens at each target's position.
    """

    model: str
    rule: str
    prompt: str
    token_ids: Int[np.ndarray, " T"]
    pieces: list[str]
    labels: list[str]
    positions: Int[np.ndarray, " N"]
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
        """Relevance of each input token: of its embedding."""
        return self.layers[:, 0]

    @property
    def experts(self) -> Float[np.ndarray, "N L T K"]:
        """Relevance of each routed slot of the feed-forward layers; K is 0 if no layer has experts."""
        return self._mixture.slots

    @property
    def expert_ids(self) -> Int[np.ndarray, "L T K"]:
        """The expert of each routed slot of the feed-forward layers."""
        return self._mixture.ids

    @property
    def expert_weights(self) -> Float[np.ndarray, "L T K"]:
        """The routing weight of each routed slot of the feed-forward layers."""
        return self._mixture.weights

    @property
    def num_experts(self) -> int:
        """Experts of a feed-forward layer."""
        return self._mixture.count

    def by_expert(self, how: str = "sum") -> Float[np.ndarray, "N L E"]:
        """Relevance of each feed-forward expert of each layer (:meth:`ExpertRelevance.by_expert`)."""
        return self._mixture.by_expert(how)

    def drop_renormalise(self) -> Float[np.ndarray, "N L T K"]:
        """Score of dropping a feed-forward expert and renormalising (:meth:`ExpertRelevance.drop_renormalise`)."""
        return self._mixture.drop_renormalise()

    def neurons(self, layer: int, expert: int) -> Float[np.ndarray, "N T F"]:
        """Relevance of an expert's hidden units for each token; zero where it was not selected.

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
        """The experts; where there are none, arrays that hold none, so that no reader has to ask."""
        if self.feed_forward is not None:
            return self.feed_forward
        shape = (*self.heads.shape[:-1], 0)
        none = np.zeros(shape[1:], self.heads.dtype)
        return ExpertRelevance(np.zeros(shape, self.heads.dtype), none.astype(np.int32), none, 0)

    def to_dict(self) -> RelevanceReport:
        """Everything as plain data, for JSON and for the reports."""
        books, residual = self.ledger, self.ledger.residual
        targets = [
            {
                "label": self.labels[n],
                "position": int(self.positions[n]),
                "value": float(books.target[n]),
                "candidates": [c._asdict() for c in self.candidates[n]],
                "tokens": self.tokens[n].tolist(),
                "layers": self.layers[n].tolist(),
                "experts": self.experts[n].tolist(),
                "heads": self.heads[n].tolist(),
                "ledger": {
                    "target": float(books.target[n]),
                    "tokens": float(books.tokens[n]),
                    "leaks": {name: leak[n].tolist() for name, leak in books.leaks.items()},
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

    def show(self, target: int = 0) -> Any:
        """In a notebook a figure, which displays itself; in a terminal the coloured text."""
        from moejax import report

        if _in_notebook():
            return report.figure(self.to_dict(), target)
        return report.render(self.to_dict())

    def save_html(self, path: str | Path) -> None:
        """Write a self-contained page."""
        from moejax import report

        Path(path).write_text(report.to_html(self.to_dict()), encoding="utf-8")


def _in_notebook() -> bool:
    import sys

    shell = sys.modules.get("IPython")
    return bool(shell and shell.get_ipython() and "IPKernelApp" in shell.get_ipython().config)
