"""From a published checkpoint to a decoder on the device."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moejax.checkpoints.files import read_config
from moejax.checkpoints.orbax import OrbaxFolder, is_orbax, load_orbax
from moejax.checkpoints.plan import LeafPlan, PackedPlan, make_plan
from moejax.checkpoints.safetensors import SafetensorsFolder, TensorSource
from moejax.checkpoints.torch import TorchModel
from moejax.errors import CheckpointError, ConfigError
from moejax.models import Config, Decoder, ShardingRules, exchanging, family, shardings
from moejax.ops.mxfp4 import MXFP4

PUBLISHED = ("*.json", "*.safetensors", "*.jinja")
"""What of a model on the hub is of use here; never its pickles or its code."""

BUNDLED = Path(__file__).parents[1] / "bundled"


def find(source: Any, files: Sequence[str] = PUBLISHED) -> Path:
    """The local folder of a model: ``source`` itself, a bundled name, or a hub id, whose ``files`` are downloaded.

    Raises:
        CheckpointError: there is no such model.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    bundled = BUNDLED / str(source)
    return bundled if bundled.is_dir() else download(str(source), files)


def load_decoder(
    hugging_face: dict[str, Any],
    source: TensorSource,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    keep_packed: bool = False,
) -> Decoder:
    """Build the decoder that ``hugging_face`` describes and fill it from ``source``, whose dtype it keeps by default.

    With a mesh, each device is given its part of a leaf, as :func:`moejax.models.shardings` places it, and no more of
    a leaf than such a part is assembled at a time. With ``keep_packed``, experts stay MXFP4 on the device.

    Raises:
        ConfigError: the configuration is not supported, or the rules do not fit it or the mesh.
        CheckpointError: the tensors do not fit it.
    """
    kind = family(hugging_face.get("model_type"))
    config = kind.config(hugging_face)
    abstract = Decoder.abstract(pack(config) if keep_packed else config)
    placed = {} if mesh is None else shardings(abstract, mesh, rules)
    plans = make_plan(abstract, kind.keys, source.entries)
    leaves = [_read(plan, source, dtype, placed.get(plan.path)) for plan in plans]
    decoder = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return decoder if mesh is None else exchanging(decoder, placed)


def pack(config: Config) -> Config:
    """``config`` with experts held as MXFP4.

    Raises:
        ConfigError: the family is not published so.
    """
    if not family(config.model_type).has_packed_experts:
        raise ConfigError(f"{config.model_type} is not published with MXFP4 experts; there is nothing to keep packed.")
    return config.pack()


def _read(
    plan: LeafPlan | PackedPlan, source: TensorSource, dtype: DTypeLike | None, placed: NamedSharding | None
) -> jax.Array:
    if isinstance(plan, PackedPlan):
        # unpacked where it is used: fewer bytes travel, and a device is faster at it
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
    # one part at a time; jax.make_array_from_callback would hold those of all devices on the host at once
    for same in devices.values():
        part = plan.read(source, dtype, indices[same[0]])
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in same])
        del part  # before the next is read
    return jax.make_array_from_single_device_arrays(plan.shape, placed, arrays)


@cache
def _unpacker(placed: NamedSharding | None) -> Callable[[MXFP4, DTypeLike], jax.Array]:
    return jax.jit(MXFP4.unpack, static_argnums=1, out_shardings=placed)


def _packed_placement(plan: PackedPlan, placed: NamedSharding | None) -> NamedSharding | None:
    """The placement of a leaf's blocks and scales: as the leaf's, but a last axis may not divide into whole blocks."""
    if placed is None:
        return None
    *rows, last = (*placed.spec, *[None] * (len(plan.shape) - len(placed.spec)))
    split = last if last is not None and plan.scales.shape[-1] % placed.mesh.shape[last] == 0 else None
    return NamedSharding(placed.mesh, PartitionSpec(*rows, split))


def load_folder(
    folder: Path,
    dtype: DTypeLike | None = None,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    keep_packed: bool = False,
) -> Decoder:
    """Load a Hugging Face folder, or what ``moejax convert`` wrote; as :func:`load_decoder`."""
    if is_orbax(folder):
        if keep_packed:
            raise CheckpointError(f"{folder} was converted, its experts are stored in full; load the original packed.")
        if mesh is None:
            return load_orbax(folder, dtype)
        placed = shardings(OrbaxFolder(folder).abstract, mesh, rules)
        return exchanging(load_orbax(folder, dtype, placed), placed)
    config, source = read_config(folder), SafetensorsFolder(folder)
    return load_decoder(config, source, dtype, mesh=mesh, rules=rules, keep_packed=keep_packed)


def load_torch(
    model: Any, dtype: DTypeLike | None = None, *, mesh: Mesh | None = None, rules: ShardingRules | None = None
) -> Decoder:
    """Load a ``transformers`` model that is in memory; as :func:`load_decoder`."""
    return load_decoder(model.config.to_dict(), TorchModel(model), dtype, mesh=mesh, rules=rules)


def download(name: str, files: Sequence[str] = PUBLISHED) -> Path:
    """The local folder of a model on the Hugging Face hub, downloading those of ``files`` that are not there yet.

    Raises:
        CheckpointError: the name is neither a folder nor a model that can be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is no folder, no bundled model, and the hub did not give it: {reason}"
        ) from error
