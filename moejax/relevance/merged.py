"""The tokens of a result, merged into words or spans: what ``Relevance.aggregate`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moejax.errors import MoejaxError
from moejax.prompts import TEMPLATE
from moejax.report import merge

if TYPE_CHECKING:
    from moejax.relevance.experts import ExpertRelevance
    from moejax.relevance.result import Relevance


def merged(rel: Relevance, spans: list[merge.Span]) -> Relevance:
    """Sum a result over each span of tokens; the spans tile the sequence."""
    group = merge.groups_of(spans)
    feed_forward, slots = _merged_experts(rel.feed_forward, spans)
    attention, _ = _merged_experts(rel.attention, spans)
    return replace(
        rel,
        token_ids=merge.merge_ids(rel.token_ids, spans),
        pieces=_pieces(rel, spans),
        prompt_length=int(group[rel.prompt_length - 1]) + 1,
        positions=group[rel.positions].astype(rel.positions.dtype),
        roles=[rel.roles[first] for first, _ in spans] if rel.roles else [],
        layers=merge.merge_sums(rel.layers, spans, 2),
        heads=merge.merge_sums(rel.heads, spans, 2),
        shared=None if rel.shared is None else merge.merge_sums(rel.shared, spans, 2),
        feed_forward=feed_forward,
        attention=attention,
        vectors={node: _merged_vector(node, vector, slots, spans) for node, vector in rel.vectors.items()},
    )


def _merged_experts(
    experts: ExpertRelevance | None, spans: list[merge.Span]
) -> tuple[ExpertRelevance | None, merge.MergedSlots | None]:
    """Sum the slots of each span by expert."""
    if experts is None:
        return None, None
    slots = merge.MergedSlots.of(experts.ids, experts.weights, experts.count, spans)
    found = replace(
        experts, slots=slots.merge_all(experts.slots), ids=slots.ids, weights=slots.weights, of_tokens=False
    )
    return found, slots


def _merged_vector(
    node: str, vector: np.ndarray, slots: merge.MergedSlots | None, spans: list[merge.Span]
) -> np.ndarray:
    """Sum the numbers at a node over each span."""
    name, _, layer = node.rpartition(".")
    if name == "edges":
        return merge.merge_edges(vector, spans)
    if name == "neurons" and slots is not None:
        return slots.merge(vector, int(layer))
    return merge.merge_sums(vector, spans, 1)


def _pieces(rel: Relevance, spans: list[merge.Span]) -> list[str]:
    """The texts of the spans; a run of a template's tokens is named, not spelled out."""
    joined = merge.merge_pieces(rel.pieces, spans)
    for index, (first, behind) in enumerate(spans):
        if behind - first > 1 and rel.roles and {*rel.roles[first:behind]} == {TEMPLATE}:
            joined[index] = "[template]"
    return joined


def _template_spans(rel: Relevance) -> list[merge.Span]:
    """One span for each run of a chat template's tokens, and one for each other token."""
    if not rel.roles:
        raise MoejaxError("only the tokens of a chat have a template: explain messages, or a moejax.Chat.")
    spans: list[merge.Span] = []
    for token, role in enumerate(rel.roles):
        joins = role == TEMPLATE and token and rel.roles[token - 1] == TEMPLATE and token != rel.prompt_length
        spans[len(spans) - bool(joins) :] = [(spans[-1][0] if joins else token, token + 1)]
    return spans


def checked_spans(rel: Relevance, by: str | Sequence[tuple[int, int]]) -> list[merge.Span]:
    """Return the spans that tile the sequence.

    Raises:
        MoejaxError: ``by`` is another word, or spans that are not in order, overlap or leave the sequence.
    """
    if isinstance(by, str):
        if by == "template":
            return _template_spans(rel)
        if by != "words":
            raise MoejaxError(f"by={by!r} is unknown; give 'words', 'template', or spans such as [(0, 3), (5, 7)].")
        return merge.word_spans(rel.pieces, rel.prompt_length)
    return merge.tiled(by, len(rel.pieces), rel.prompt_length)
