"""The answer of ``explain``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moejax.relevance.ledger import Ledger


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

    def by_expert(self) -> Float[np.ndarray, "N L E"]:
        """Relevance of each expert of each layer, summed over the tokens routed to it."""
        targets, layers = self.slots.shape[:2]
        out = np.zeros((targets, layers, self.count + 1), self.slots.dtype)
        for layer, ids in enumerate(self.ids):
            for target in range(targets):
                np.add.at(out[target, layer], ids, self.slots[target, layer])
        # id -1 has written to the last place, which no expert has
        return out[..., :-1]


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
    ledger: Ledger
    candidates: list[list[Candidate]]

    @property
    def tokens(self) -> Float[np.ndarray, "N T"]:
        """Relevance of each input token: of its embedding."""
        return self.layers[:, 0]

    @property
    def experts(self) -> Float[np.ndarray, "N L T K"]:
        """Relevance of each routed slot of the feed-forward layers."""
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

    def by_expert(self) -> Float[np.ndarray, "N L E"]:
        """Relevance of each feed-forward expert of each layer, summed over the tokens routed to it."""
        return self._mixture.by_expert()

    @property
    def _mixture(self) -> ExpertRelevance:
        if self.feed_forward is None:
            raise AttributeError("every feed-forward layer of this model is dense: there are no experts.")
        return self.feed_forward

    def to_dict(self) -> dict[str, Any]:
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
        return {
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
