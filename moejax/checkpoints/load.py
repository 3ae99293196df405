"""Load a published checkpoint, a converted one, or a torch model into a decoder on the device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moejax.checkpoints.folder import BUNDLED as BUNDLED
from moejax.checkpoints.folder import ModelFolder
from moejax.checkpoints.orbax import OrbaxFolder
from moejax.checkpoints.plan import LeafPlan, PackedPlan, make_plan
from moejax.checkpoints.quantise import Quantiser
from moejax.checkpoints.safetensors import TensorSource
from moejax.checkpoints.tied_head import with_stored_head
from moejax.checkpoints.torch import TorchModel
from moejax.errors import CheckpointError, ConfigError
from moejax.models import Config, Decoder, ShardingRules, exchanging, family, shardings
from moejax.ops.mxfp4 import MXFP4
from moejax.ops.packed import FORMATS


def load_decoder(
    hugging_face: Mapping[str, Any],
    source: TensorSource,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    keep_packed: bool = False,
    experts: str | None = None,
    errors: dict[str, float] | None = None,
) -> Decoder:
    """Build the decoder that ``hugging_face`` describes and fill it with the tensors of ``source``.

    With a mesh, no more of a leaf than one device's part is assembled on the host at a time.

    Args:
        hugging_face: the fields of the model's Hugging Face config.
        source: its tensors, under their published keys.
        dtype: cast every leaf to it; by default each keeps the dtype of its tensors.
        mesh: the devices; each is given its part of a leaf, as :func:`moejax.models.shardings` places it. By default
            all leaves go to the default device.
        rules: the sharding rules; by default :func:`moejax.models.shardings` chooses them.
        keep_packed: keep experts as MXFP4 on the device; the same as ``experts="mxfp4"``.
        experts: hold the experts' matrices in this packed format (:data:`moejax.ops.packed.FORMATS`). Values that are
            not published in it are quantised, one leaf at a time.
        errors: if given, the relative rms errors of :class:`moejax.checkpoints.quantise.Quantisation` are written into
            it.

    Raises:
        ConfigError: the configuration is not supported, or the sharding rules do not fit it or the mesh.
        CheckpointError: the tensors do not fit the configuration.
    """
    kind = family(hugging_face.get("model_type"))
    stored = kind.config(with_stored_head(hugging_face, kind, source))
    goal = _Goal.of(stored, _packed_format(keep_packed, experts), mesh, rules)
    plans = make_plan(goal.stored, kind, source.entries)
    leaves: list[jax.Array] = []
    for plan in plans:
        exact = plan.path in goal.quantiser.paths
        leaf = _read(plan, source, None if exact else dtype, goal.stored_placed.get(plan.path))
        leaves += jax.tree.leaves(goal.quantiser(plan.path, leaf))
        del leaf  # frees its memory before the next one is read
    return goal.filled(leaves, errors)


@dataclass(frozen=True)
class _Goal:
    """The decoder to be filled, and as what its leaves are read; the two differ if experts are quantised.

    Attributes:
        held, stored: the decoder as it is to be and as it is read, with ``jax.ShapeDtypeStruct`` leaves.
        placed, stored_placed: the sharding of each of their leaves by its path; empty for the default device.
        quantiser: makes the leaves of ``held`` from those of ``stored``.
    """

    held: Decoder
    stored: Decoder
    placed: Mapping[str, NamedSharding]
    stored_placed: Mapping[str, NamedSharding]
    quantiser: Quantiser

    @classmethod
    def of(cls, config: Config, packed: str, mesh: Mesh | None, rules: ShardingRules | None) -> "_Goal":
        """Make the decoder of ``config`` with experts in a packed format; "" leaves them as they are."""
        held = Decoder.abstract(pack(config, packed) if packed else config)
        quantises = bool(packed) and not FORMATS[packed].is_published
        stored = Decoder.abstract(config) if quantises else held
        placed, stored_placed = ({} if mesh is None else shardings(tree, mesh, rules) for tree in (held, stored))
        return cls(held, stored, placed, stored_placed, Quantiser(held if quantises else stored, placed))

    def filled(self, leaves: list[jax.Array], errors: dict[str, float] | None) -> Decoder:
        """Make the decoder of its leaves, and write the quantiser's errors into ``errors`` if it is given."""
        if errors is not None:
            errors.update(self.quantiser.errors)
        decoder = jax.tree.unflatten(jax.tree.structure(self.held), leaves)
        return exchanging(decoder, self.placed) if self.placed else decoder


def _packed_format(keep_packed: bool, experts: str | None) -> str:
    """Return the name of the format that the experts' matrices are to have; "" to leave them as they are read.

    Raises:
        ConfigError: the two options contradict each other, or there is no such format.
    """
    if experts is None:
        return "mxfp4" if keep_packed else ""
    FORMATS.find(experts)
    if keep_packed and experts != "mxfp4":
        raise ConfigError(f"keep_packed keeps experts as MXFP4, experts={experts!r} does not; choose one of the two.")
    return experts


def pack(config: Config, packed: str = "mxfp4") -> Config:
    """Return ``config`` with experts that are held in a packed format.

    Raises:
        ConfigError: the family is not published with experts in this format, or has none that could be held in it.
    """
    if FORMATS.find(packed).is_published and not family(config.model_type).has_packed_experts:
        raise ConfigError(f"{config.model_type} is not published with MXFP4 experts; there is nothing to keep packed.")
    held = config.pack(packed)
    if held.packed != packed:
        raise ConfigError(f"this {config.model_type} has no experts that can be held as {packed}; leave experts= out.")
    return held


def _read(
    plan: LeafPlan | PackedPlan, source: TensorSource, dtype: DTypeLike | None, placed: NamedSharding | None
) -> jax.Array:
    """Read a leaf onto the device, or onto the devices of its sharding ``placed``."""
    if isinstance(plan, PackedPlan):
        # unpacked on the device: fewer bytes are copied to it, and it unpacks faster than the host
        where = _packed_placement(plan, placed)
        packed = MXFP4(*(_read(part, source, None, where) for part in (plan.blocks, plan.scales)))
        return _unpacker(placed)(packed, plan.dtype if dtype is None else jnp.dtype(dtype))
    if placed is None:
        return jnp.asarray(plan.read(source, dtype))
    devices: dict[str, list[jax.Device]] = {}
    indices = placed.addressable_devices_indices_map(plan.shape)
    for device, index in indices.items():
        devices.setdefault(str(index), []).append(device)
    arrays = []
    # one part at a time, since jax.make_array_from_callback would hold the parts of all devices on the host at once
    for same in devices.values():
        part = plan.read(source, dtype, indices[same[0]])
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in same])
        del part  # frees its memory before the next part is read
    return jax.make_array_from_single_device_arrays(plan.shape, placed, arrays)


@cache
def _unpacker(placed: NamedSharding | None) -> Callable[[MXFP4, DTypeLike], jax.Array]:
    """Return a compiled function that unpacks MXFP4 to a dtype, with its result placed on devices."""
    return jax.jit(MXFP4.unpack, static_argnums=1, out_shardings=placed)


def _packed_placement(plan: PackedPlan, placed: NamedSharding | None) -> NamedSharding | None:
    """Return the sharding of a leaf's blocks and scales.

    It is the leaf's sharding, but the last axis is not split if a device's part of it would cut a block.
    """
    if placed is None:
        return None
    *rows, last = (*placed.spec, *[None] * (len(plan.shape) - len(placed.spec)))
    split = last if last is not None and plan.scales.shape[-1] % placed.mesh.shape[last] == 0 else None
    return NamedSharding(placed.mesh, PartitionSpec(*rows, split))


def load_folder(
    folder: Path | ModelFolder,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    keep_packed: bool = False,
    experts: str | None = None,
    errors: dict[str, float] | None = None,
) -> Decoder:
    """Load a folder of Hugging Face files, or one that ``moejax convert`` wrote.

    The arguments are as in :func:`load_decoder`.

    Raises:
        ConfigError: the configuration is not supported, or the sharding rules do not fit it or the mesh.
        CheckpointError: the weights do not fit the configuration, or change while they are read; or ``keep_packed`` is
            given for a converted folder.
    """
    opened = folder if isinstance(folder, ModelFolder) else ModelFolder.read(folder)
    if not opened.is_orbax:
        source = opened.tensors()
        options = {"mesh": mesh, "rules": rules, "keep_packed": keep_packed, "experts": experts, "errors": errors}
        decoder = load_decoder(opened.hugging_face, source, dtype, **options)
        opened.stamps.check()
        return decoder
    packed = _packed_format(keep_packed, experts)
    if packed and FORMATS[packed].is_published:
        raise CheckpointError(
            f"{opened.path} was converted, so its experts are stored in full; load the original with keep_packed."
        )
    stored = OrbaxFolder(opened)
    goal = _Goal.of(stored.abstract.config, packed, mesh, rules)
    decoder = goal.filled(stored.read(dtype, goal.stored_placed, goal.quantiser.paths, goal.quantiser), errors)
    opened.stamps.check()
    return decoder


def load_torch(
    model: Any,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    experts: str | None = None,
    errors: dict[str, float] | None = None,
) -> Decoder:
    """Load a ``transformers`` model that is in memory; the arguments and errors are as in :func:`load_decoder`."""
    options = {"mesh": mesh, "rules": rules, "experts": experts, "errors": errors}
    return load_decoder(model.config.to_dict(), TorchModel(model), dtype, **options)
