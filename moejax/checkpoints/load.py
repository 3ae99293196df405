"""Load a published checkpoint, a converted one, or a torch model into a decoder on the device."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moejax.checkpoints.folder import ModelFolder
from moejax.checkpoints.orbax import OrbaxFolder
from moejax.checkpoints.plan import LeafPlan, PackedPlan, make_plan
from moejax.checkpoints.safetensors import TensorSource
from moejax.checkpoints.tied_head import with_stored_head
from moejax.checkpoints.torch import TorchModel
from moejax.errors import CheckpointError, ConfigError
from moejax.models import Config, Decoder, ShardingRules, exchanging, family, shardings
from moejax.ops.mxfp4 import MXFP4


def load_decoder(
    hugging_face: Mapping[str, Any],
    source: TensorSource,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    keep_packed: bool = False,
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
        keep_packed: keep experts as MXFP4 on the device.

    Raises:
        ConfigError: the configuration is not supported, or the sharding rules do not fit it or the mesh.
        CheckpointError: the tensors do not fit the configuration.
    """
    kind = family(hugging_face.get("model_type"))
    config = kind.config(with_stored_head(hugging_face, kind, source))
    abstract = Decoder.abstract(pack(config) if keep_packed else config)
    placed = {} if mesh is None else shardings(abstract, mesh, rules)
    plans = make_plan(abstract, kind.keys, source.entries)
    leaves = [_read(plan, source, dtype, placed.get(plan.path)) for plan in plans]
    decoder = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return decoder if mesh is None else exchanging(decoder, placed)


def pack(config: Config) -> Config:
    """Return ``config`` with experts that are held as MXFP4.

    Raises:
        ConfigError: the family is not published with MXFP4 experts.
    """
    if not family(config.model_type).has_packed_experts:
        raise ConfigError(f"{config.model_type} is not published with MXFP4 experts; there is nothing to keep packed.")
    return config.pack()


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
) -> Decoder:
    """Load a folder of Hugging Face files, or one that ``moejax convert`` wrote.

    The arguments are as in :func:`load_decoder`.

    Raises:
        ConfigError: the configuration is not supported, or the sharding rules do not fit it or the mesh.
        CheckpointError: the weights do not fit the configuration, or ``keep_packed`` is given for a converted folder.
    """
    opened = folder if isinstance(folder, ModelFolder) else ModelFolder.read(folder)
    if not opened.is_orbax:
        source = opened.tensors()
        return load_decoder(opened.hugging_face, source, dtype, mesh=mesh, rules=rules, keep_packed=keep_packed)
    if keep_packed:
        raise CheckpointError(
            f"{opened.path} was converted, so its experts are stored in full; load the original with keep_packed."
        )
    stored = OrbaxFolder(opened)
    if mesh is None:
        return stored.decoder(dtype)
    placed = shardings(stored.abstract, mesh, rules)
    return exchanging(stored.decoder(dtype, placed), placed)


def load_torch(
    model: Any, dtype: DTypeLike | None = None, *, mesh: Mesh | None = None, rules: ShardingRules | None = None
) -> Decoder:
    """Load a ``transformers`` model that is in memory; the arguments and errors are as in :func:`load_decoder`."""
    return load_decoder(model.config.to_dict(), TorchModel(model), dtype, mesh=mesh, rules=rules)
