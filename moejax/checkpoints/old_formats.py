"""Paths of leaves in Orbax folders of older formats.

A leaf of the decoder that is renamed keeps its old path in every folder that was converted before. ``RENAMES`` lists
these leaves, one a line, so that such a folder is restored without being converted again:

    Rename("layers.{layer}.feed_forward.gate_up", "layers.{layer}.feed_forward.experts.gate_up")

says that format 2 stored ``layers.7.feed_forward.gate_up`` and that the decoder calls this leaf
``layers.7.feed_forward.experts.gate_up`` now. A leaf keeps its part (``layers.7``), shape and dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moejax.checkpoints.plan import split_layer

READABLE = (2,)
"""The older formats that can be read beside the current one (:data:`moejax.checkpoints.orbax.FORMAT`)."""


@dataclass(frozen=True)
class Rename:
    """A leaf that got another path, or a module whose leaves all did.

    Attributes:
        old: the path in the older format, with ``{layer}`` for the index of a layer.
        new: the path in the decoder.
        applies: returns from the Hugging Face config whether the line holds for a model. It is needed if a new path had
            different old paths in different families. By default the line holds for every model.
    """

    old: str
    new: str
    applies: Callable[[Mapping[str, Any]], bool] = lambda fields: True


# The table of renames from format 2 to format 3. No leaf has been renamed yet.
RENAMES: Sequence[Rename] = ()
"""The first line that matches a leaf's path or its module counts, so a longer path goes before a shorter one."""


def current_path(path: str, fields: Mapping[str, Any]) -> str:
    """Return the decoder's path of a leaf that an older format stored as ``path``.

    Args:
        path: the path in the folder; it is returned unchanged if it was not renamed.
        fields: the Hugging Face config of the folder.
    """
    return _replaced(path, [(rename.old, rename.new) for rename in RENAMES if rename.applies(fields)])


def old_path(path: str, fields: Mapping[str, Any]) -> str:
    """Return the path under which an older format stored the decoder's leaf ``path``: inverts :func:`current_path`."""
    return _replaced(path, [(rename.new, rename.old) for rename in RENAMES if rename.applies(fields)])


def _replaced(path: str, pairs: Sequence[tuple[str, str]]) -> str:
    template, layer = split_layer(path)
    for before, after in pairs:
        if template == before or template.startswith(f"{before}."):
            return (after + template[len(before) :]).replace("{layer}", layer)
    return path
