"""Shared by all views of an explanation: sums, the check of shapes, and the text of the ledger and of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moejax.report.schema import SCHEMA, RelevanceReport
from moejax.report.visible import visible as visible

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ExpertUse:
    """Relevance of one expert of one layer for a target, and its use."""

    expert: int
    relevance: float
    """Signed sum over the tokens that are routed to it."""
    share: float
    """abs(relevance) over the sum of abs(relevance) of all experts of the layer."""
    tokens: int
    """Number of tokens of the sequence that are routed to it."""


def check(report: RelevanceReport) -> None:
    """Check that the arrays of an explanation fit together.

    Raises:
        ValueError: two shapes disagree (the message names the key and both), an index is out of range, or another
            version wrote the report.
    """
    if report.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"the report has schema {report.get('schema')}, but this version of moejax reads {SCHEMA}")
    length, layers = len(report["tokens"]), len(report["expert_ids"])
    ids = _integers(report["expert_ids"])
    if ids.ndim != 3:
        raise ValueError(
            f"expert_ids has shape {ids.shape}, expected [layers, tokens, slots]: pass Relevance.to_dict()"
        )
    # ids are -1 in layers without experts; in a model without any experts there are no slots
    if ids.size and not (ids.min() >= -1 and ids.max() < report["num_experts"]):
        raise ValueError(f"expert_ids holds {ids.min()}..{ids.max()}, but num_experts is {report['num_experts']}")
    slots = (layers, length, ids.shape[2])
    _expect("token_ids", report["token_ids"], (length,))
    _expect("expert_ids", report["expert_ids"], slots)
    _expect("expert_weights", report["expert_weights"], slots)
    if not report["targets"]:
        raise ValueError("targets is empty: a report needs at least one target")
    for n, target in enumerate(report["targets"]):
        _expect(f"targets[{n}].tokens", target["tokens"], (length,))
        _expect(f"targets[{n}].layers", target["layers"], (layers + 1, length))
        _expect(f"targets[{n}].experts", target["experts"], slots)
        heads = np.shape(target["heads"])
        _expect(f"targets[{n}].heads", target["heads"], (layers, length, heads[-1] if heads else 0))
        if not 0 <= target["position"] < length:
            raise ValueError(f"targets[{n}].position is {target['position']}, outside the {length} tokens")


def expert_map(report: RelevanceReport, target: int = 0) -> Floats:
    """Relevance [L, E] of every expert, summed over the tokens routed to it."""
    return _by_expert(report, floats(report["targets"][target]["experts"]))


def routed_counts(report: RelevanceReport) -> Ints:
    """Number of tokens [L, E] of the sequence that are routed to every expert."""
    return _by_expert(report, np.ones(np.shape(report["expert_ids"]))).astype(np.int64)


def _by_expert(report: RelevanceReport, slots: Floats) -> Floats:
    """Sums [L, E] over the slots [L, T, K] of each expert; zeros in layers without experts."""
    ids, experts = _integers(report["expert_ids"]), int(report["num_experts"])
    # bin 0 collects slots without an expert (id -1) and is dropped
    rows = [np.bincount(i.ravel() + 1, s.ravel(), experts + 1)[1:] for i, s in zip(ids, slots, strict=True)]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), experts)


def head_map(report: RelevanceReport, target: int = 0) -> Floats:
    """Relevance [L, H] of every attention head, summed over tokens."""
    return floats(report["targets"][target]["heads"]).sum(axis=1)


def top_experts(report: RelevanceReport, target: int = 0, top: int = 3) -> list[list[ExpertUse]]:
    """The ``top`` experts of every layer among those routed to, by the absolute value of their summed relevance."""
    sums, counts = expert_map(report, target), routed_counts(report)
    layers = []
    for row, count in zip(sums, counts, strict=True):
        total = float(np.abs(row).sum())
        # unrouted experts have no relevance: where few experts are routed to, they would only pad the list with zeros
        ranked = sorted(np.flatnonzero(count), key=lambda e: (-abs(row[e]), -count[e], e))[:top]
        fraction = np.abs(row) / total if total > 0 else np.zeros_like(row)
        layers.append([ExpertUse(int(e), float(row[e]), float(fraction[e]), int(count[e])) for e in ranked])
    return layers


def summary_line(report: RelevanceReport, target: int = 0) -> str:
    """The conservation ledger of one target, as one line of plain text."""
    ledger = report["targets"][target]["ledger"]
    total, residual = float(ledger["target"]), float(ledger["residual"])
    line = f"ledger: logit {total:.3f} = tokens {float(ledger['tokens']):.3f}"
    for name, per_layer in ledger["leaks"].items():
        line += _term(name, f"{float(np.sum(floats(per_layer))):.3f}")
    line += _term("residual", f"{residual:.1e}")
    return line + (f" ({abs(residual / total):.1e} of the logit)" if total else "")


def scale_of(values: Floats) -> float:
    """The largest finite absolute value; 1.0 if all values are zero, so that one can divide by it."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def quoted(token: str) -> str:
    """A token between quotation marks, which show its leading space."""
    return f"'{visible(token)}'"


def floats(values: Any) -> Floats:
    """An array of float64; JSON null, which stands for a number that is not finite, becomes NaN."""
    return np.asarray(values, dtype=np.float64)


def _integers(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int64)


def _term(name: str, number: str) -> str:
    """One summand; a minus sign becomes the operator, so that the line reads as an equation."""
    return f" - {name} {number[1:]}" if number.startswith("-") else f" + {name} {number}"


def _expect(key: str, values: Any, shape: tuple[int, ...]) -> None:
    actual = np.shape(values)
    if actual != shape:
        raise ValueError(
            f"{key} has shape {actual}, expected {shape}: pass the complete dictionary of Relevance.to_dict()"
        )
