"""A decoder over several devices: sharding rules lay the logical axes of its leaves on the axes of a mesh.

Which logical axes a leaf has is known to the part that it belongs to (:attr:`moejax.layers.PartConfig.axes`; those of
experts are ``EXPERT_AXES`` in :mod:`moejax.layers.feed_forward.experts`). The
compiled functions stay as they are: weights carry their placement, and XLA derives the placement of everything else,
except for experts (:mod:`moejax.ops.experts.expert_parallel`) and for independent work
(:mod:`moejax.models.data_parallel`).
"""

from collections.abc import Iterator, Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.errors import ConfigError
from moejax.models.config import Config, split_path
from moejax.models.data_parallel import DATA
from moejax.models.decoder import Decoder
from moejax.ops.device import AXIS

ShardingRules = Mapping[str, str | None]
"""From logical axes to mesh axes; an axis that is absent or ``None`` is replicated."""

EXPERT: ShardingRules = {"expert": "expert"}
"""Every device holds some experts, whole, and a copy of all else."""

TENSOR: ShardingRules = {"heads": "tensor", "kv_heads": "tensor", "hidden": "tensor", "vocab": "tensor"}
"""Every device holds some heads, a part of each expert's hidden units and some vocabulary entries.

Queries are split with the key/value heads that they read: over no more devices than there are of these.
"""

EXPERT_TENSOR: ShardingRules = {**EXPERT, **TENSOR}
"""Both, on a mesh of two axes."""


def shardings(abstract: Decoder, mesh: Mesh, rules: ShardingRules | None = None) -> dict[str, NamedSharding]:
    """The placement of every leaf by its path, in the tree's order.

    The placements are on the same devices with axes that are left to XLA (``AxisType.Auto``), as is the mesh for
    ``jax.set_mesh``, if you set one: ``jax.make_mesh(.., axis_types=(AxisType.Auto,))``.

    Args:
        abstract: a decoder; only the shapes of its leaves are read.
        rules: by default those of :data:`EXPERT_TENSOR` for which the mesh has an axis. Over an axis ``data`` weights
            are replicated, and devices divide sequences, targets and interventions among them.

    Raises:
        ConfigError: a rule names an axis that does not exist, or splits one that the mesh axis does not divide.
    """
    rules = _default_rules(mesh) if rules is None else rules
    _check(rules, mesh, abstract.config)
    # leave placement to XLA even where the mesh's axes are explicit, as jax.make_mesh makes them
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    placed, uneven = {}, {}
    for path, leaf in _leaves(abstract):
        names = abstract.config.axes(path) or (None,) * leaf.ndim
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


def shard(decoder: Decoder, mesh: Mesh, rules: ShardingRules | None = None) -> Decoder:
    """A decoder that is in memory, laid over a mesh. Raises as :func:`shardings` does.

    A mesh of one device brings it back; moved by ``jax.device_put`` alone it would still count on the others.
    """
    leaves, tree = jax.tree.flatten(decoder)
    placed = shardings(decoder, mesh, rules)
    return exchanging(tree.unflatten(jax.device_put(leaves, list(placed.values()))), placed)


def exchanging(decoder: Decoder, placed: Mapping[str, NamedSharding]) -> Decoder:
    """The decoder, told over which devices its experts lie and which of them divide independent work among them."""
    mesh = next((s.mesh for s in placed.values() if isinstance(s.mesh, Mesh)), None)
    split = any(s.spec[0] == AXIS for path, s in placed.items() if decoder.config.role(path) == "expert")
    # where weights lie along it, that axis is not one of copies
    shared = mesh is not None and DATA in mesh.axis_names and not any(DATA in s.spec for s in placed.values())
    config = decoder.config.on_mesh(mesh if split or mesh is None else _renamed(mesh), mesh if shared else None)
    return jax.tree.unflatten(jax.tree.structure(Decoder.abstract(config)), jax.tree.leaves(decoder))


def _renamed(mesh: Mesh) -> Mesh:
    """A mesh over whose axis ``expert`` no experts are split, under another name."""
    return Mesh(mesh.devices, [f"no {name}" if name == AXIS else name for name in mesh.axis_names])


def _leaves(tree: Decoder) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _default_rules(mesh: Mesh) -> ShardingRules:
    rules = {name: axis for name, axis in EXPERT_TENSOR.items() if axis in mesh.axis_names}
    if not rules and DATA not in mesh.axis_names:
        raise ConfigError(
            f"the mesh has axes {', '.join(mesh.axis_names)}; name them 'data', 'expert' or 'tensor', or pass rules."
        )
    return rules


def _check(rules: ShardingRules, mesh: Mesh, config: Config) -> None:
    parts = [axes for block in config.blocks for axes in block.axes.values()]
    known = set(EXPERT_TENSOR) | {"model"} | {name for axes in parts for name in axes if name}
    if unknown := sorted(set(rules) - known):
        raise ConfigError(f"rules for unknown logical axes {unknown}; known are: {', '.join(sorted(known))}.")
    if absent := sorted({axis for axis in rules.values() if axis} - set(mesh.axis_names)):
        raise ConfigError(f"rules for mesh axes {absent}, but the mesh has {list(mesh.axis_names)}.")


def _count(config: Config, path: str, name: str | None, size: int) -> int:
    """The number that must divide evenly along an axis: its heads where it consists of heads, else its entries."""
    layer, rest = split_path(path)
    if name not in ("heads", "kv_heads") or layer is None:
        return size
    sizes = config.blocks[layer].half(rest.partition(".")[0]).sizes
    return sizes.num_heads if name == "heads" else sizes.num_kv_heads


def _uneven(name: str, count: int, path: str, mesh_axis: str, devices: int) -> str:
    return (
        f"{path}: its axis {name!r} of {count} cannot be split over the {devices} devices of mesh axis {mesh_axis!r}; "
        f"use a mesh axis that divides {count}, or leave {name!r} out of the rules to replicate it"
    )
