"""Merging of tokens: subwords into words, or spans that a user names. The page and ``Relevance.aggregate`` share it.

A span is a pair of a first token and the token behind its last. Spans given by a user may leave gaps; the spans that
the functions here pass around tile the sequence, with a span of one token for each token that stays by itself.

Letters of shapes: N targets, L layers, T tokens, K routed slots, E experts; U merged tokens, J slots of a merged token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from moejax.errors import MoejaxError
from moejax.report.schema import RelevanceReport

Span = tuple[int, int]
"""A first token, and the token behind the last."""

# Scripts that write no space between words: Thai, Lao, Burmese, Khmer, kana, Han. Their tokens stay as they are, or a
# whole sentence would count as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+(?:['\u2019][^\W{_UNSPACED}]+)*")
_MARK = re.compile(rf"[^\w\s{_UNSPACED}]")


def word_spans(pieces: Sequence[str], prompt_length: int) -> list[Span]:
    """Find the words of a sequence of tokens: neighbours share a word if no space or sign stands between them.

    A word is a run of letters, digits and inner apostrophes. No word reaches from the prompt into the answer.

    Args:
        pieces: text of each token, with its spaces.
        prompt_length: number of tokens of the prompt.
    """
    text = _MARK.sub(_letter, "".join(pieces))
    inner = {at for word in _WORD.finditer(text) for at in range(word.start() + 1, word.end())}
    starts, place = [], 0
    for index, piece in enumerate(pieces):
        # a token of no text is the rest of a character that the token before it has
        if index in (0, prompt_length) or (piece and place not in inner):
            starts.append(index)
        place += len(piece)
    return list(zip(starts, [*starts[1:], len(pieces)], strict=True))


def _letter(mark: re.Match[str]) -> str:
    """Return a letter in place of a combining mark, or of a byte that is no character by itself."""
    return "a" if mark[0] == "\ufffd" or unicodedata.category(mark[0]).startswith("M") else mark[0]


def tiled(spans: Sequence[Sequence[int]], length: int, prompt_length: int) -> list[Span]:
    """Fill the gaps between spans with spans of one token.

    Raises:
        MoejaxError: a span is no pair of numbers, is empty, leaves the sequence, overlaps the span before it, or holds
            tokens of the prompt and of the answer.
    """
    whole: list[Span] = []
    end = 0
    for span in spans:
        if len(span) != 2:
            raise MoejaxError(f"span {tuple(span)!r} is no pair: give a first token and the token behind the last.")
        first, behind = map(int, span)
        if not end <= first < behind <= length:
            why = f"overlaps a span before it (token {end - 1})" if first < end and end else "is empty or out of range"
            raise MoejaxError(f"span ({first}, {behind}) {why}: give spans in order within 0..{length}.")
        if first < prompt_length < behind:
            where = f"at token {prompt_length}"
            raise MoejaxError(f"span ({first}, {behind}) holds tokens of prompt and answer; split it {where}.")
        whole += [*((t, t + 1) for t in range(end, first)), (first, behind)]
        end = behind
    return whole + [(t, t + 1) for t in range(end, length)]


def groups_of(spans: Sequence[Span]) -> np.ndarray:
    """Return for each of T tokens the index of its span, [T]."""
    return np.repeat(np.arange(len(spans)), [behind - first for first, behind in spans])


def merge_sums(values: np.ndarray, spans: Sequence[Span], axis: int) -> np.ndarray:
    """Sum the axis T of ``values`` over each span; sums are made in float64 and have the dtype of ``values``."""
    if len(spans) == values.shape[axis]:
        return values
    starts = [first for first, _ in spans]
    return np.add.reduceat(values, starts, axis=axis, dtype=np.float64).astype(values.dtype)


def merge_pieces(pieces: Sequence[str], spans: Sequence[Span]) -> list[str]:
    """Join the texts of each span."""
    return ["".join(pieces[first:behind]) for first, behind in spans]


def merge_ids(token_ids: Any, spans: Sequence[Span]) -> np.ndarray:
    """Return the id of each span of one token, and -1 for longer spans, which have none, [U]."""
    ids = np.asarray(token_ids)
    return np.array([ids[first] if behind - first == 1 else -1 for first, behind in spans], ids.dtype)


@dataclass(frozen=True)
class MergedSlots:
    """The routed slots of merged tokens: one for each expert that any of the merged tokens was routed to.

    Attributes:
        ids: experts, those of the largest weight first; -1 behind the last, [L U J].
        weights: sum of an expert's routing weights over the merged tokens, [L U J].
        places: for each slot of a token, the index of its slot among all ``U * J`` of the layer; -1 for none, [L T K].
    """

    ids: np.ndarray
    weights: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, weights: np.ndarray, count: int, spans: Sequence[Span]) -> MergedSlots:
        """Merge the slots of each span.

        Args:
            ids, weights: expert and weight of each slot, [L T K]; id -1 for none.
            count: number E of experts.
            spans: the spans, which tile the tokens.
        """
        layers, merged = len(ids), len(spans)
        # the last of E + 1 places collects slots without an expert
        rows = (np.arange(layers)[:, None] * merged + groups_of(spans))[..., None] * (count + 1)
        where, size = (rows + ids % (count + 1)).ravel(), layers * merged * (count + 1)
        shape = layers, merged, count + 1
        routed = np.bincount(where, minlength=size).reshape(shape)[..., :-1] > 0
        sums = np.bincount(where, weights.ravel(), size).reshape(shape)[..., :-1]
        width = int(routed.sum(-1).max(initial=0))
        order = np.argsort(np.where(routed, -sums, np.inf), axis=-1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(count), order.shape), axis=-1)
        first = order[..., :width]
        present = np.take_along_axis(routed, first, axis=-1)
        kept_ids = np.where(present, first, -1).astype(ids.dtype)
        kept = np.where(present, np.take_along_axis(sums, first, axis=-1), 0).astype(weights.dtype)
        group = groups_of(spans)[:, None]
        places = [np.where(i < 0, -1, group * width + r[group, i.clip(0)]) for i, r in zip(ids, rank, strict=True)]
        return cls(kept_ids, kept, np.array(places).reshape(ids.shape))

    def merge(self, values: np.ndarray, layer: int) -> np.ndarray:
        """Sum what belongs to the slots of one layer, [N T K ..], by expert, to [N U J ..]."""
        merged, width = self.ids.shape[1:]
        places = self.places[layer].ravel()
        flat = np.moveaxis(values.reshape(len(values), len(places), *values.shape[3:]), 1, 0)
        sums = np.zeros((merged * width, *flat.shape[1:]))
        np.add.at(sums, places[places >= 0], flat[places >= 0])
        return np.moveaxis(sums, 0, 1).reshape(len(values), merged, width, *values.shape[3:]).astype(values.dtype)

    def merge_all(self, slots: np.ndarray) -> np.ndarray:
        """Sum the slots of all layers, [N L T K], by expert, to [N L U J]."""
        merged = [self.merge(slots[:, layer], layer) for layer in range(slots.shape[1])]
        return np.stack(merged, axis=1) if merged else np.zeros((len(slots), *self.ids.shape), slots.dtype)


def merge_edges(edges: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Sum what queries read from keys, [.. T T], over the spans of both, to [.. U U]."""
    return merge_sums(merge_sums(edges, spans, -1), spans, -2)


def merge_report(report: RelevanceReport, spans: Sequence[Span]) -> RelevanceReport:
    """Merge the tokens of a report, as ``Relevance.aggregate(spans).to_dict()`` does without its arrays."""
    group = groups_of(spans)

    def floats(values: Any) -> np.ndarray:
        return np.asarray(values, np.float64)

    slots = MergedSlots.of(
        np.asarray(report["expert_ids"], np.int64),
        floats(report["expert_weights"]),
        report["num_experts"],
        spans,
    )
    targets = [
        target
        | {
            "position": int(group[target["position"]]),
            "tokens": merge_sums(floats(target["tokens"]), spans, 0).tolist(),
            "layers": merge_sums(floats(target["layers"]), spans, 1).tolist(),
            "experts": slots.merge_all(floats(target["experts"])[None])[0].tolist(),
            "heads": merge_sums(floats(target["heads"]), spans, 1).tolist(),
            "edges": {name: merge_edges(floats(e), spans).tolist() for name, e in target.get("edges", {}).items()},
        }
        for target in report["targets"]
    ]
    merged = report | {
        "tokens": merge_pieces(report["tokens"], spans),
        "token_ids": merge_ids(report["token_ids"], spans).tolist(),
        "prompt_length": int(group[prompt_length(report) - 1]) + 1,
        "expert_ids": slots.ids.tolist(),
        "expert_weights": slots.weights.tolist(),
        "targets": targets,
    }
    return cast(RelevanceReport, merged)


def prompt_length(report: RelevanceReport) -> int:
    """Return the number of tokens of the prompt; in reports that do not tell it, all."""
    return report.get("prompt_length", len(report["tokens"]))
