"""Paths that leaves had in files which older versions wrote.

A leaf of the decoder that is renamed keeps its old path in every folder that was converted or trained before.
``RENAMES`` lists these leaves, one a line, so that such a folder is restored without being converted again:

    Rename("layers.{layer}.feed_forward.gate_up", "layers.{layer}.feed_forward.experts.gate_up")

says that format 2 stored ``layers.7.feed_forward.gate_up`` and that the decoder calls this leaf
``layers.7.feed_forward.experts.gate_up`` now. A leaf keeps its part (``layers.7``), shape and dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


def _registered(fields: Mapping[str, Any]) -> bool:
    """True for decoders of our own, whose mixtures are registered layers."""
    return fields.get("model_type") == "moejax"


def _published(fields: Mapping[str, Any]) -> bool:
    return not _registered(fields)


_FEED_FORWARD = "layers.{layer}.feed_forward."


def _renames(pairs: Mapping[str, str], applies: Callable[[Mapping[str, Any]], bool]) -> list[Rename]:
    return [Rename(_FEED_FORWARD + old, _FEED_FORWARD + new, applies) for old, new in pairs.items()]


_MLP = {"input": "gate_up", "output": "down", "input_bias": "gate_up_bias", "output_bias": "down_bias"}

RENAMES: Sequence[Rename] = (
    Rename("layers.{layer}.attention.router.linear", "layers.{layer}.attention.router"),
    *_renames(
        {
            "router.linear": "router",
            **{name: f"experts.{name}" for name in ("gate_up", "down", "gate_up_bias", "down_bias")},
            "shared.gate": "shared.router",
            **{f"shared.mlp.{old}": f"shared.mlp.{new}" for old, new in _MLP.items()},
        },
        _published,
    ),
    *_renames(
        {
            "gate_weight": "router.weight",
            "router_bias": "router.selection_bias",
            **{f"experts.{old}": f"experts.{new}" for old, new in _MLP.items()},
            **{f"shared.{old}": f"shared.mlp.{new}" for old, new in _MLP.items()},
        },
        _registered,
    ),
    # dense layers, after the experts, whose old names were the same as these new ones
    *_renames(_MLP, lambda fields: True),
)
"""Renames from format 2 to format 3. The first line that matches a leaf's path or its module counts, so a longer path
goes before a shorter one."""


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


def _replaced(path: str, pairs: list[tuple[str, str]]) -> str:
    # the path may be a key table's, which says {layer} itself
    first, _, rest = path.partition(".")
    layer, _, rest = rest.partition(".")
    template = f"layers.{{layer}}.{rest}" if first == "layers" else path
    for before, after in pairs:
        if template == before or template.startswith(f"{before}."):
            return (after + template[len(before) :]).replace("{layer}", layer)
    return path
