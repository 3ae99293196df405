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
class Relevance:
    """Relevance of N targets for everything that was gated, signed, in units of the target's logit.

    Attributes:
        model, rule, prompt: what was explained, how, and the text of the sequence.
        token_ids, pieces: the input sequence and each token's text.
        labels: what each target is.
        positions: the token whose successor each target predicts.
        layers: relevance of the residual stream entering each layer; last, the final norm.
        experts: relevance of each routed slot's weighted output.
        expert_ids, expert_weights: the routing behind the slots.
        heads: relevance of each attention head's output.
        ledger: the books.
        candidates: the most likely next tokens at each target's position.
        num_experts: experts of a layer.
    """

    model: str
    rule: str
    prompt: str
    token_ids: Int[np.ndarray, " T"]
    pieces: list[str]
    labels: list[str]
    positions: Int[np.ndarray, " N"]
    layers: Float[np.ndarray, "N L1 T"]
    experts: Float[np.ndarray, "N L T K"]
    expert_ids: Int[np.ndarray, "L T K"]
    expert_weights: Float[np.ndarray, "L T K"]
    heads: Float[np.ndarray, "N L T H"]
    ledger: Ledger
    candidates: list[list[Candidate]]
    num_experts: int

    @property
    def tokens(self) -> Float[np.ndarray, "N T"]:
        """Relevance of each input token: of its embedding."""
        return self.layers[:, 0]

    def by_expert(self) -> Float[np.ndarray, "N L E"]:
        """Relevance of each expert of each layer, summed over the tokens routed to it."""
        targets, layers = self.experts.shape[:2]
        out = np.zeros((targets, layers, self.num_experts), self.experts.dtype)
        for layer, ids in enumerate(self.expert_ids):
            for target in range(targets):
                np.add.at(out[target, layer], ids, self.experts[target, layer])
        return out

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
            "num_experts": self.num_experts,
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
