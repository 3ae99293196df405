"""A decoder over several devices: logical axes of its leaves, and rules that lay them on the axes of a mesh.

The compiled functions stay as they are: weights carry their placement, XLA derives that of everything else, but for
experts (:mod:`moejax.ops.experts.expert_parallel`) and what is independent (:mod:`moejax.models.data_parallel`).
"""

import re
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.errors import ConfigError
from moejax.layers import RegisteredConfig
from moejax.models.config import Config
from moejax.models.data_parallel import DATA
from moejax.models.decoder import Decoder
from moejax.ops.device import AXIS

Axes = tuple[str | None, ...]
"""Logical name of each axis of a leaf; ``None`` is never split."""

Rules = Mapping[str, str | None]
"""From logical axes to mesh axes; an axis that is absent or ``None`` is replicated."""

EXPERT: Rules = {"expert": "expert"}
"""Every device holds some experts, whole, and a copy of all else."""

TENSOR: Rules = {"heads": "tensor", "kv_heads": "tensor", "hidden": "tensor", "vocab": "tensor"}
"""Every device holds some heads, a part of each expert's hidden units and some vocabulary entries.

Queries are split with the key/value heads that they read: over no more devices than there are of these.
"""

EXPERT_TENSOR: Rules = {**EXPERT, **TENSOR}
"""Both, on a mesh of two axes."""

_LAYER = re.compile(r"layers\.(\d+)\.")
_GATED, _DOWN = (None, "hidden", "model"), ("model", "hidden")
_PACKED = {"blocks": (None,), "scales": ()}

AXES: Mapping[str, Axes] = {
    "embedding": ("vocab", "model"),
    "head": ("vocab", "model"),
    "norm.weight": (None,),
    "attention_norm.weight": (None,),
    "feed_forward_norm.weight": (None,),
    # attention
    "attention.query_key_value.weight": ("kv_heads", None, None, "model"),
    "attention.query_key_value.bias": ("kv_heads", None, None),
    "attention.output.weight": ("model", "heads"),
    "attention.output.bias": (None,),
    "attention.query_norm.weight": (None,),
    "attention.key_norm.weight": (None,),
    "attention.sinks": ("heads",),
    # mixture of attention experts; the keys' rows stand before the values', so no contiguous part holds whole heads
    "attention.router.linear.weight": (None, "model"),
    "attention.query": ("expert", "kv_heads", "model"),
    "attention.output": ("expert", "model", "kv_heads"),
    "attention.key_value.weight": (None, "model"),
    "attention.bias": (None,),
    # experts; a router split like them would send scores around three times a layer to find the best of them
    "feed_forward.router.linear.weight": (None, "model"),
    "feed_forward.router.linear.bias": (None,),
    "feed_forward.gate_up": ("expert", *_GATED),
    "feed_forward.down": ("expert", *_DOWN),
    # packed ones: the blocks of a row stay together, since their number divides less often than that of values
    **{f"feed_forward.gate_up.{part}": ("expert", *_GATED, *rest) for part, rest in _PACKED.items()},
    **{f"feed_forward.down.{part}": ("expert", "model", None, *rest) for part, rest in _PACKED.items()},
    "feed_forward.gate_up_bias": ("expert", None, "hidden"),
    "feed_forward.down_bias": ("expert", None),
    "feed_forward.bias": (None,),
    # those of registered layers; whatever else they have is on every device
    "feed_forward.gate_weight": (None, "model"),
    "feed_forward.experts.input": ("expert", *_GATED),
    "feed_forward.experts.output": ("expert", *_DOWN),
    "feed_forward.experts.input_bias": ("expert", None, "hidden"),
    "feed_forward.experts.output_bias": ("expert", None),
    # shared expert, dense layer
    "feed_forward.shared.mlp.input": _GATED,
    "feed_forward.shared.mlp.output": _DOWN,
    "feed_forward.shared.gate.weight": (None, "model"),
    "feed_forward.input": _GATED,
    "feed_forward.output": _DOWN,
    "feed_forward.input_bias": (None, "hidden"),
    "feed_forward.output_bias": (None,),
}
"""Logical axes of every leaf, by its path (that of a layer's leaf within its layer)."""


def shardings(
    abstract: Decoder, mesh: Mesh, rules: Rules | None = None, axes: Mapping[str, Axes] = AXES
) -> dict[str, NamedSharding]:
    """The placement of every leaf by its path, in the tree's order.

    Args:
        abstract: a decoder; of its leaves only the shapes are read.
        rules: by default those of :data:`EXPERT_TENSOR` for which the mesh has an axis; over an axis ``data`` weights
            are replicated, and devices share sequences, targets and interventions.
        axes: logical axes by path; to place a layer of your own, add its leaves to :data:`AXES`.

    The placements are on the same devices with axes that are left to XLA (``AxisType.Auto``), as is the mesh for
    ``jax.set_mesh``, if you set one: ``jax.make_mesh(.., axis_types=(AxisType.Auto,))``.

    Raises:
        ConfigError: a rule names an axis that does not exist, or splits one that the mesh axis does not divide.
    """
    rules = _default_rules(mesh) if rules is None else rules
    _check(rules, mesh, axes)
    # leave placement to XLA even where the mesh's axes are explicit, as those of jax.make_mesh are
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    placed, uneven = {}, {}
    for path, leaf in _leaves(abstract):
        own = _replicated(abstract.config, path, leaf)
        names = logical_axes(path, axes) if own is None else own
        if len(names) != leaf.ndim:
            raise ConfigError(f"{path} has shape {list(leaf.shape)}, but {len(names)} logical axes: {names}.")
        spec = [rules.get(name) if name else None for name in names]
        for name, size, mesh_axis in zip(names, leaf.shape, spec, strict=True):
            count = _count(abstract.config, path, name, size)
            if mesh_axis and count % mesh.shape[mesh_axis]:
                uneven.setdefault((name, count), (path, mesh_axis, mesh.shape[mesh_axis]))
        twice = {axis for axis in spec if axis and spec.count(axis) > 1}
        if twice:
            raise ConfigError(f"{path} {names}: the rules lay two of its axes on mesh axis {twice.pop()!r}.")
        placed[path] = NamedSharding(mesh, PartitionSpec(*spec))
    if uneven:
        raise ConfigError("; ".join(_uneven(*key, *where) for key, where in uneven.items()) + ".")
    return placed


def shard(decoder: Decoder, mesh: Mesh, rules: Rules | None = None, axes: Mapping[str, Axes] = AXES) -> Decoder:
    """A decoder that is in memory, laid over a mesh. Raises as :func:`shardings` does.

    A mesh of one device brings it back; moved by ``jax.device_put`` alone it would still count on the others.
    """
    leaves, tree = jax.tree.flatten(decoder)
    placed = shardings(decoder, mesh, rules, axes)
    return exchanging(tree.unflatten(jax.device_put(leaves, list(placed.values()))), placed)


def exchanging(decoder: Decoder, placed: Mapping[str, NamedSharding]) -> Decoder:
    """The decoder, told over which devices its experts lie and which of them share what is independent."""
    mesh = next((s.mesh for s in placed.values() if isinstance(s.mesh, Mesh)), None)
    split = any(s.spec[0] == AXIS for path, s in placed.items() if by_expert(path))
    # where weights lie along it, that axis is not one of copies
    shared = mesh is not None and DATA in mesh.axis_names and not any(DATA in s.spec for s in placed.values())
    config = decoder.config.on_mesh(mesh if split or mesh is None else _renamed(mesh), mesh if shared else None)
    return jax.tree.unflatten(jax.tree.structure(Decoder.abstract(config)), jax.tree.leaves(decoder))


def _renamed(mesh: Mesh) -> Mesh:
    """A mesh over whose axis ``expert`` no experts are split, under another name."""
    return Mesh(mesh.devices, [f"no {name}" if name == AXIS else name for name in mesh.axis_names])


def by_expert(path: str) -> bool:
    """Whether the leaf at ``path`` has something for each expert, of which a token uses some."""
    return AXES.get(_in_layer(path), (None,))[:1] == ("expert",)


def _in_layer(path: str) -> str:
    return _LAYER.sub("", path, count=1)


def logical_axes(path: str, axes: Mapping[str, Axes] = AXES) -> Axes:
    """Logical axes of the leaf at ``path``.

    Raises:
        ConfigError: the table has no entry for it.
    """
    name = _in_layer(path)
    if name not in axes:
        raise ConfigError(f"leaf {path}: no logical axes are known for {name!r}; add an entry to the table of axes.")
    return axes[name]


def _leaves(tree: Decoder) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _replicated(config: Config, path: str, leaf: jax.ShapeDtypeStruct) -> Axes | None:
    """Axes that are never split, for a leaf that only a registered layer knows."""
    layer = _LAYER.match(path)
    own = layer is not None and isinstance(config.blocks[int(layer[1])].feed_forward, RegisteredConfig)
    name = _in_layer(path)
    # but for its experts a registered layer's names are its own, though a published family may have one of them
    theirs = name.startswith("feed_forward.") and not name.startswith("feed_forward.experts.")
    return (None,) * leaf.ndim if own and theirs else None


def _default_rules(mesh: Mesh) -> Rules:
    rules = {name: axis for name, axis in EXPERT_TENSOR.items() if axis in mesh.axis_names}
    if not rules and DATA not in mesh.axis_names:
        raise ConfigError(
            f"the mesh has axes {', '.join(mesh.axis_names)}; name them 'data', 'expert' or 'tensor', or pass rules."
        )
    return rules


def _check(rules: Rules, mesh: Mesh, axes: Mapping[str, Axes]) -> None:
    known = {name for names in axes.values() for name in names if name}
    if unknown := sorted(set(rules) - known):
        raise ConfigError(f"rules for unknown logical axes {unknown}; known are: {', '.join(sorted(known))}.")
    if absent := sorted({axis for axis in rules.values() if axis} - set(mesh.axis_names)):
        raise ConfigError(f"rules for mesh axes {absent}, but the mesh has {list(mesh.axis_names)}.")


def _count(config: Config, path: str, name: str | None, size: int) -> int:
    """What must divide evenly along an axis: its heads where it consists of heads, else its entries."""
    if name not in ("heads", "kv_heads") or not (layer := _LAYER.match(path)):
        return size
    attention = config.blocks[int(layer[1])].attention
    return attention.num_heads if name == "heads" else attention.num_kv_heads


def _uneven(name: str, count: int, path: str, mesh_axis: str, devices: int) -> str:
    return (
        f"{path}: its axis {name!r} of {count} cannot be split over the {devices} devices of mesh axis {mesh_axis!r}; "
        f"use a mesh axis that divides {count}, or leave {name!r} out of the rules to replicate it"
    )
