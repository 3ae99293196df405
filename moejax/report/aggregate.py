"""What every view of a report shares: its numbers, its colours and the words of its ledger. Plain numpy, no drawing."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Report = Mapping[str, Any]
"""The dictionary made by ``Relevance.to_dict()``; every leaf is a JSON value."""

Colour = tuple[int, int, int]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DIVERGING: tuple[Colour, ...] = ((33, 102, 172), (146, 197, 222), (255, 255, 255), (244, 165, 130), (178, 24, 43))
"""Blue, white, red at -1, -1/2, 0, 1/2, 1: told apart by every common colour blindness."""

# Characters that would reorder or break the text around them when shown as they are.
_UNSAFE = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u2028", "\u2029", "\u200e", "\u200f"}
_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class ExpertUse:
    """What one expert of one layer did for a target."""

    expert: int
    relevance: float
    """Signed sum over the tokens routed to it."""
    share: float
    """abs(relevance) over the sum of abs(relevance) of all experts in the layer."""
    tokens: int
    """How many tokens of the sequence are routed to it."""


def check(report: Report) -> None:
    """Raise ValueError, naming the key and both shapes, when the arrays of a report do not belong together."""
    length, layers = len(report["tokens"]), len(report["expert_ids"])
    ids = _integers(report["expert_ids"])
    if ids.ndim != 3:
        raise ValueError(
            f"expert_ids has shape {ids.shape}, expected [layers, tokens, slots]: pass Relevance.to_dict()"
        )
    # -1 in layers without experts; of a model that has none at all there are no slots
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


def expert_map(report: Report, target: int = 0) -> Floats:
    """Relevance of every expert, summed over the tokens routed to it: [layers, experts]."""
    return _by_expert(report, floats(report["targets"][target]["experts"]))


def routed_counts(report: Report) -> Ints:
    """How many tokens of the sequence are routed to every expert: [layers, experts]."""
    return _by_expert(report, np.ones(np.shape(report["expert_ids"]))).astype(np.int64)


def _by_expert(report: Report, slots: Floats) -> Floats:
    """Sums over the slots [layers, tokens, slots] of each expert; layers without experts have zeros."""
    ids, experts = _integers(report["expert_ids"]), int(report["num_experts"])
    # one place for slots of no expert, in front
    rows = [np.bincount(i.ravel() + 1, s.ravel(), experts + 1)[1:] for i, s in zip(ids, slots, strict=True)]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), experts)


def head_map(report: Report, target: int = 0) -> Floats:
    """Relevance of every attention head, summed over tokens: [layers, heads]."""
    return floats(report["targets"][target]["heads"]).sum(axis=1)


def top_experts(report: Report, target: int = 0, top: int = 3) -> list[list[ExpertUse]]:
    """For every layer the `top` experts that were routed to, by the absolute value of their summed relevance."""
    sums, counts = expert_map(report, target), routed_counts(report)
    layers = []
    for row, count in zip(sums, counts, strict=True):
        total = float(np.abs(row).sum())
        # Unrouted experts have no relevance: with few routed experts they would only pad the list with zeros.
        ranked = sorted(np.flatnonzero(count), key=lambda e: (-abs(row[e]), -count[e], e))[:top]
        share = np.abs(row) / total if total > 0 else np.zeros_like(row)
        layers.append([ExpertUse(int(e), float(row[e]), float(share[e]), int(count[e])) for e in ranked])
    return layers


def summary_line(report: Report, target: int = 0) -> str:
    """The conservation ledger of one target as a single line of plain text."""
    ledger = report["targets"][target]["ledger"]
    total, residual = float(ledger["target"]), float(ledger["residual"])
    line = f"ledger: logit {total:.3f} = tokens {float(ledger['tokens']):.3f}"
    for name, per_layer in ledger["leaks"].items():
        line += _term(name, f"{float(np.sum(floats(per_layer))):.3f}")
    line += _term("residual", f"{residual:.1e}")
    return line + (f" ({abs(residual / total):.1e} of the logit)" if total else "")


def scale_of(values: Floats) -> float:
    """The largest finite absolute value, 1.0 where all are zero, so that it can always divide."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def colour(value: float, scale: float) -> Colour:
    """The diverging colour of a signed value: blue at -scale, white at zero, red at +scale."""
    unit = min(1.0, max(-1.0, value / scale)) if np.isfinite(value) else 0.0
    place = (unit + 1.0) / 2.0 * (len(DIVERGING) - 1)
    left = min(int(place), len(DIVERGING) - 2)
    near, far, part = DIVERGING[left], DIVERGING[left + 1], place - left
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(near, far, strict=True))
    return red, green, blue


def ink(background: Colour) -> Colour:
    """Black or white, whichever reads better on a background (WCAG contrast; never under 4.5)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255.0 for v in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def visible(token: str) -> str:
    """A token as it can be shown in running text: itself, with line breaks, tabs and control characters made visible.

    A token is text that someone else wrote. An escape character or a direction override in it must not reach a
    terminal or a page, where it would change what stands beside it.
    """
    return "".join(map(_visible_character, token)) or "∅"


def quoted(token: str) -> str:
    """A token between quotation marks, so that its leading space is seen."""
    return f"'{visible(token)}'"


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in ("Cc", "Cs") or character in _UNSAFE:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character


def floats(values: Any) -> Floats:
    """An array of float64; JSON null, which stands for a number that is not finite, becomes nan."""
    return np.asarray(values, dtype=np.float64)


def _integers(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int64)


def _term(name: str, number: str) -> str:
    """One signed summand; the sign is the operator, so that the line reads as the equation it is."""
    return f" - {name} {number[1:]}" if number.startswith("-") else f" + {name} {number}"


def _expect(key: str, values: Any, shape: tuple[int, ...]) -> None:
    found = np.shape(values)
    if found != shape:
        raise ValueError(f"{key} has shape {found}, expected {shape}: pass the whole dictionary of Relevance.to_dict()")
