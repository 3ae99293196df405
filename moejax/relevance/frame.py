"""A result as a tidy table: one row for each number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.errors import MoejaxError

if TYPE_CHECKING:
    from moejax.relevance.result import Relevance

_AXES = {
    "tokens": ("target", "token"),
    "experts": ("target", "layer", "token", "slot"),
    "heads": ("target", "layer", "token", "head"),
    "layers": ("target", "layer", "token"),
}
"""The axes of each kind of table; each is a column of indices."""


def to_frame(rel: Relevance, kind: str) -> Any:
    """Make the table that ``Relevance.to_frame`` describes.

    Raises:
        MoejaxError: pandas is not installed, or there is no such kind.
    """
    if kind not in _AXES:
        raise MoejaxError(f"kind={kind!r} is unknown; choose from {', '.join(_AXES)}.")
    try:
        import pandas
    except ImportError as error:
        raise MoejaxError("to_frame needs pandas, which is not installed: pip install pandas") from error
    values = np.asarray(getattr(rel, kind))
    at = dict(zip(_AXES[kind], (index.ravel() for index in np.indices(values.shape)), strict=True))
    target, token = at["target"], at["token"]
    columns = {
        "target": target,
        "label": _texts(rel.labels)[target],
        **{name: index for name, index in at.items() if name != "target"},
        "piece": _texts(rel.pieces)[token],
        "token_id": rel.token_ids[token],
        "part": np.where(token < rel.prompt_length, "prompt", "answer").astype(object),
    }
    if kind == "experts":
        slot = at["layer"], token, at["slot"]
        columns |= {"expert": rel.expert_ids[slot], "weight": rel.expert_weights[slot]}
    columns["relevance"] = values.ravel()
    table = pandas.DataFrame(columns)
    # slots of layers without experts hold nothing
    return table[table["expert"] >= 0].reset_index(drop=True) if kind == "experts" else table


def _texts(texts: list[str]) -> np.ndarray:
    """Texts as an array. Half of a surrogate pair, which a token may be, is no text to pandas and is escaped."""
    return np.array([text.encode("utf-8", "backslashreplace").decode() for text in texts], object)
