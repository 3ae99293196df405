"""The result of ``explain``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Int

from moejax.errors import MoejaxError
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.ledger import Ledger
from moejax.report.numbers import finite, listed, number
from moejax.report.schema import SCHEMA, RelevanceReport
from moejax.writing import write_file


class Candidate(NamedTuple):
    """A likely next token: its text, id, logit and probability."""

    token: str
    id: int
    logit: float
    probability: float


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
        prompt_length: number of tokens of the prompt. The rest is the answer that the target appended, without its last
            token, which no token reads.
        layers: relevance of the residual stream entering each layer; last, the final norm.
        heads: relevance of each attention head's output.
        feed_forward: relevance of the experts of feed-forward layers; ``None`` if no layer has any.
        attention: relevance of attention experts; ``None`` in families without them.
        shared: relevance of the shared expert's gated output, for each token; ``None`` in families without it.
        vectors: relevance of every number at the nodes that were asked for.
        ledger: the explained value, the relevance of the input, and the leaks between them.
        candidates: the most likely next tokens at each target's position.
        roles: of a chat, the role of each token (:class:`moejax.prompts.EncodedPrompt`); empty for other prompts.
    """

    model: str
    rule: str
    prompt: str
    prompt_length: int
    layers: Float[np.ndarray, "N L1 T"]
    heads: Float[np.ndarray, "N L T H"]
    feed_forward: ExpertRelevance | None
    attention: ExpertRelevance | None
    shared: Float[np.ndarray, "N L T 1"] | None
    vectors: dict[str, np.ndarray]
    ledger: Ledger
    candidates: list[list[Candidate]]
    roles: list[str] = field(default_factory=list)

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
        """Return the result as plain data, for JSON and for the reports; a number that is not finite is ``None``."""
        ledger, residual = self.ledger, self.ledger.residual
        edges = {node.removeprefix("edges."): v for node, v in self.vectors.items() if node.startswith("edges.")}
        targets = [
            {
                "label": self.labels[n],
                "position": int(self.positions[n]),
                "value": number(ledger.target[n]),
                "candidates": [finite(c._asdict()) for c in self.candidates[n]],
                "tokens": listed(self.tokens[n]),
                "layers": listed(self.layers[n]),
                "experts": listed(self.experts[n]),
                "heads": listed(self.heads[n]),
                "ledger": {
                    "target": number(ledger.target[n]),
                    "tokens": number(ledger.tokens[n]),
                    "leaks": {name: listed(leak[n]) for name, leak in ledger.leaks.items()},
                    "residual": number(residual[n]),
                },
            }
            | ({"edges": {layer: listed(v[n]) for layer, v in edges.items()}} if edges else {})
            for n in range(len(self.labels))
        ]
        report = {
            "schema": SCHEMA,
            "model": self.model,
            "rule": self.rule,
            "prompt": self.prompt,
            "prompt_length": self.prompt_length,
            "tokens": self.pieces,
            "token_ids": self.token_ids.tolist(),
            "num_experts": self._mixture.count,
            "expert_ids": self.expert_ids.tolist(),
            "expert_weights": listed(self.expert_weights),
            "targets": targets,
        }
        return cast(RelevanceReport, report)

    def aggregate(self, by: str | Sequence[tuple[int, int]] = "words") -> "Relevance":
        """Merge tokens into words or spans: the axis T of the result has a column for each of them.

        Relevance of tokens, layers, heads and nodes is summed, so the ledger stays as it is. A merged token has a slot
        for each expert that any of its tokens was routed to: relevance and routing weights are summed by expert, so
        that :meth:`by_expert` gives the same sums. Its counts, and sums of absolute values, are then of merged tokens.

        Args:
            by: ``"words"``; or ``"template"``, which makes one token of each run of tokens that a chat template added,
                so that pictures show what people wrote; or spans ``(first, behind)`` in order, where tokens outside of
                all spans stay as they are. The id of a merged token is -1. No word or span reaches from the prompt into
                the answer.

        Raises:
            MoejaxError: another word; spans that are out of order or range, overlap, or hold tokens of both parts.
        """
        from moejax.relevance.merged import checked_spans, merged

        return merged(self, checked_spans(self, by))

    def to_frame(self, kind: str = "tokens") -> Any:
        """Return the result as a pandas ``DataFrame`` with one row for each number.

        Columns are ``target``, ``label``, ``token``, ``piece``, ``token_id``, ``part`` (``"prompt"`` or ``"answer"``)
        and ``relevance``; except for tokens ``layer``, where the last of ``"layers"`` is the final norm; and ``head``,
        or ``slot``, ``expert`` and ``weight``.

        Args:
            kind: ``"tokens"``, ``"experts"``, ``"heads"`` or ``"layers"``.

        Raises:
            MoejaxError: pandas is not installed, or there is no such kind.
        """
        from moejax.relevance.frame import to_frame

        return to_frame(self, kind)

    def save(self, path: str | Path) -> None:
        """Write the result into one safetensors file, from which :meth:`load` reads it back bit for bit.

        Raises:
            MoejaxError: the file cannot be written.
        """
        from moejax.relevance.store import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Relevance":
        """Read a result that :meth:`save` wrote; no model is needed.

        Raises:
            MoejaxError: the file is missing, damaged, no saved result, or of a newer version.
        """
        from moejax.relevance.store import load

        return load(path)

    def show(self, target: int = 0, plot: str | None = None, scale: str = "linear", **options: Any) -> Any:
        """Show a target: as a figure, which displays itself, in a notebook, and as coloured text in a terminal.

        In a notebook, the result itself as the last line of a cell shows the interactive page with all targets.

        Args:
            target: index of the target.
            plot: the name of a plot, a key of ``report.PLOTS``; it is drawn in a terminal too, as a figure to save.
            scale: ``"linear"``, or ``"sqrt"`` for colours by the square root, which show small values beside large.
            options: further arguments of the plot.

        Raises:
            MoejaxError: there is no such plot or scale; the message lists all names.
        """
        from moejax import report

        # a plot from outside need not know of scales
        options |= {} if scale == "linear" else {"scale": scale}
        if plot is not None:
            return report.plot(plot, self.to_dict(), target, **options)
        if _in_notebook():
            return report.figure(self.to_dict(), target, **options)
        return report.render(self.to_dict(), scale=scale)

    def save_html(self, path: str | Path) -> None:
        """Write the report as a self-contained page; one that is there is replaced once the new one is complete."""
        from moejax import report

        write_file(Path(path), report.to_html(self.to_dict()))

    def __repr__(self) -> str:
        """Model, rule, targets, sizes and the ledger's largest residual."""
        layers, tokens, slots = self.expert_ids.shape
        residual = np.abs(self.ledger.residual).max(initial=0.0)
        return (
            f"Relevance(model={self.model!r}, rule={self.rule}, targets={self.labels}, "
            f"T={tokens}, L={layers}, K={slots}, residual={residual:.1e})"
        )

    def _repr_html_(self) -> str:
        """Format the interactive page, in a frame, for a notebook that ends a cell with the result."""
        from moejax import report

        return report.to_notebook(self.to_dict())


def _in_notebook() -> bool:
    """Return whether this runs in a Jupyter kernel."""
    import sys

    shell = sys.modules.get("IPython")
    return bool(shell and shell.get_ipython() and "IPKernelApp" in shell.get_ipython().config)
