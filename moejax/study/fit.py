"""Which work with a model fits which GPU, and with what options; from estimates alone, for ``moejax doctor --gpu``.

Before a large model is loaded, :func:`options_here` says with which options it fits the device at hand.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np

from moejax.checkpoints.convert import parse_dtype
from moejax.checkpoints.describe import architecture
from moejax.checkpoints.dtypes import free_memory
from moejax.checkpoints.folder import is_on_disk
from moejax.checkpoints.hub import is_reachable
from moejax.checkpoints.load import pack
from moejax.checkpoints.memory import Memory, estimate
from moejax.errors import CheckpointError, ConfigError, MoejaxError
from moejax.models import Config, Decoder
from moejax.ops.device import assumed_gpu, compute_capability, target
from moejax.ops.memory import FRACTION, MARGIN, reserve_memory
from moejax.ops.packed import FORMATS, is_packed
from moejax.relevance.budget import Arrangement, Footprint
from moejax.report.fit import FitEntry, FitReport


@dataclass(frozen=True)
class GPU:
    """A GPU by its memory.

    Attributes:
        name: its name.
        mebibytes: the memory that its driver shows.
        capability: its compute capability, which decides about kernels; empty for other devices.
        free: bytes that are known to be free.
    """

    name: str
    mebibytes: int
    capability: str
    free: int | None = None

    @property
    def usable(self) -> int:
        """The bytes that JAX can use (:func:`moejax.ops.memory.reserve_memory`)."""
        return int(FRACTION * (self.mebibytes << 20)) if self.free is None else self.free

    @property
    def emulates_bfloat16(self) -> bool:
        """Whether it has no units for bfloat16."""
        return 0 < compute_capability(SimpleNamespace(compute_capability=self.capability)) < 8


GPUS: Mapping[str, GPU] = {
    "t4": GPU("NVIDIA T4", 15_360, "7.5"),
    "v100-16": GPU("NVIDIA V100 16 GB", 16_384, "7.0"),
    "v100-32": GPU("NVIDIA V100 32 GB", 32_768, "7.0"),
    "rtx4080": GPU("NVIDIA GeForce RTX 4080", 16_376, "8.9"),
    "a10": GPU("NVIDIA A10", 23_028, "8.6"),
    "l4": GPU("NVIDIA L4", 23_034, "8.9"),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 24_576, "8.6"),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 24_564, "8.9"),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", 32_607, "12.0"),
    "a100-40": GPU("NVIDIA A100 40 GB", 40_960, "8.0"),
    "l40s": GPU("NVIDIA L40S", 46_068, "8.9"),
    "a6000": GPU("NVIDIA RTX A6000", 49_140, "8.6"),
    "a100-80": GPU("NVIDIA A100 80 GB", 81_920, "8.0"),
    "h100": GPU("NVIDIA H100 80 GB", 81_559, "9.0"),
    "h200": GPU("NVIDIA H200", 143_771, "9.0"),
    "b200": GPU("NVIDIA B200", 183_359, "10.0"),
}
"""GPUs by the names that ``moejax doctor --gpu`` takes."""

HERE = "here"
"""The name of the device at hand, which ``moejax doctor --gpu`` takes too."""

_TRAINED = 18
"""Bytes of a parameter in training: float32 weights, gradients and AdamW's two moments, and a copy of the weights in
bfloat16. A small model's program took 16 on a CPU."""


@dataclass(frozen=True)
class Work:
    """The work to fit.

    Attributes:
        tokens: tokens of the prompt, and of a sequence in training.
        targets: targets of an explanation.
        new_tokens: tokens that a generation adds.
    """

    tokens: int = 512
    targets: int = 16
    new_tokens: int = 256


def here() -> GPU:
    """Return the device that JAX computes on and the memory that is free on it, this machine's if it is a CPU.

    Raises:
        MoejaxError: the device does not say how much memory is free.
    """
    reserve_memory()
    device = target()
    stats = device.memory_stats() or {}
    size = stats.get("bytes_limit")
    free = free_memory() if device.platform == "cpu" else size and size - stats.get("bytes_in_use", 0)
    if free is None:
        raise MoejaxError(f"{device.device_kind} does not say how much memory is free.")
    return GPU(device.device_kind, (size or free) >> 20, str(getattr(device, "compute_capability", "")), free)


def fit(model: Any, gpu: str, *, dtype: Any = None, work: Work = Work()) -> FitReport:
    """Estimate whether loading, explaining, generating and training fit a GPU. No weights are read.

    All but training has an entry for every way to hold the experts: in full, packed as they are published (MXFP4),
    rounded to int8.

    Args:
        model: a loaded model, a folder with a ``config.json``, a bundled name or a hub id.
        gpu: a name in :data:`GPUS`, or ``"here"`` for the device that JAX computes on and what is free of its memory.
        dtype: the dtype of the weights; by default bfloat16.

    Returns:
        A dictionary that can be written as JSON.

    Raises:
        MoejaxError: there is no such GPU in the table.
        ConfigError: the model's configuration is not supported.
        CheckpointError: there is no such model.
    """
    if (card := here() if gpu == HERE else GPUS.get(gpu)) is None:
        raise MoejaxError(f"GPU {gpu!r} is not in the table; choose from {', '.join(GPUS)}, {HERE}.")
    weights = parse_dtype("bfloat16" if dtype is None else dtype)
    config = architecture(model)
    # estimates ask which kernels the device has
    with assumed_gpu(card.capability):
        ways = [_Way(held, weights, card.usable, estimate(held, weights)) for held in _held(config)]
        entries = [way.load() for way in ways]
        entries += [way.explain(work.tokens, work.targets) for way in ways]
        entries += [way.generate(work.tokens, work.new_tokens) for way in ways]
        entries += [_train(config, weights, card.usable, work.tokens)]
    report = {"gpu": gpu, "name": card.name, "bytes": card.mebibytes << 20, "usable": card.usable}
    return cast(FitReport, report | {"model": str(model), "work": entries, "emulates_bfloat16": card.emulates_bfloat16})


def options_here(model: str | Path, work: str = "explain", *, size: Work = Work()) -> dict[str, Any]:
    """Return options of :func:`moejax.load` with which some work fits the device at hand.

    Experts are held exactly, unless only rounded ones leave the room to explain all targets at a time. Of a model that
    is not on this machine the config is downloaded, if the hub answers within five seconds.

    Args:
        model: a folder, a bundled name or a hub id.
        work: ``"load"``, ``"explain"`` or ``"generate"``.
        size: tokens and targets.

    Raises:
        MoejaxError: it does not fit, or the device does not say how much memory is free.
        ConfigError: the model's configuration is not supported.
        CheckpointError: there is no such model, or the hub cannot be reached.
    """
    if not is_on_disk(model) and not is_reachable():
        raise CheckpointError(f"{model} is not on this machine, and the hub cannot be reached.")
    report = fit(model, HERE, work=size)
    ways = [entry for entry in report["work"] if entry["work"].split()[0] == work]
    if not ways:
        raise MoejaxError(f"work {work!r} is unknown; choose from load, explain, generate.")
    roomy = [entry for entry in ways if entry.get("chunk", size.targets) == size.targets]
    for entry in [*roomy, *ways]:
        if entry["fits"]:
            return {"dtype": entry["dtype"]} | ({"experts": entry["experts"]} if entry["experts"] else {})
    least, free = (number / 2**30 for number in (min(entry["bytes"] for entry in ways), report["usable"]))
    raise MoejaxError(f"to {work} {model} takes {least:.1f} GiB, and {free:.1f} are free on {report['name']}.")


def _held(config: Config) -> Iterator[Config]:
    """Yield the config with experts in full, and in every packed format in which they can be; exact ones first."""
    if not config.is_packed:
        yield config
    for name in sorted(FORMATS, key=lambda name: not FORMATS[name].is_published):
        with contextlib.suppress(ConfigError):
            yield pack(config, name)


@dataclass(frozen=True)
class _Way:
    """A model as it may be held.

    Attributes:
        config: its config, with or without packed experts.
        dtype: the dtype of everything that is not packed.
        usable: bytes of the GPU.
        memory: bytes of weights and cache.
    """

    config: Config
    dtype: np.dtype
    usable: int
    memory: Memory

    def entry(self, work: str, size: int, **more: Any) -> FitEntry:
        """Describe some work that takes ``size`` bytes, weights included."""
        options = [f"--dtype {self.dtype.name}"]
        if packed := self.config.packed:
            options.append("--keep-packed" if FORMATS[packed].is_published else f"--experts {packed}")
        about = {"work": work, "fits": size <= self.usable, "bytes": size, "options": " ".join(options)}
        about |= {"dtype": self.dtype.name, "experts": self.config.packed, "weights": self.memory.total}
        return cast(FitEntry, about | more)

    def load(self) -> FitEntry:
        """Estimate loading; experts that are quantised are on the device in the checkpoint's dtype for a moment."""
        packed, moment = self.config.packed, 0
        if packed and not FORMATS[packed].is_published:
            matrices = jax.tree.leaves(Decoder.abstract(self.config, self.dtype), is_leaf=is_packed)
            moment = max(math.prod(m.shape) for m in matrices if is_packed(m)) * self.dtype.itemsize
        return self.entry("load", self.memory.total + moment)

    def explain(self, tokens: int, targets: int) -> FitEntry:
        """Estimate an explanation in the arrangement that ``max_bytes="auto"`` would choose."""
        footprint = Footprint.of(self.config, 1, tokens, self.dtype.itemsize)
        try:
            chosen = footprint.arrange(targets, int((1 - MARGIN) * (self.usable - self.memory.total)))
        except MoejaxError:
            chosen = Arrangement(1, max(footprint.layers - 1, 0))
        size = self.memory.total + int(footprint.bytes(targets, chosen) / (1 - MARGIN))
        name = f"explain {tokens} tokens, {targets} target{'s' * (targets > 1)}"
        return self.entry(name, size, chunk=chosen.chunk, rematerialised_layers=chosen.rematerialised_layers)

    def generate(self, tokens: int, new_tokens: int) -> FitEntry:
        """Estimate a generation: the cache, and what a layer takes while it reads the prompt."""
        cache = self.memory.cache_per_token * (tokens + new_tokens)
        passed = forward_bytes(self.config, 1, tokens, self.dtype.itemsize)
        return self.entry(f"generate {new_tokens} tokens after {tokens}", self.memory.total + cache + passed)


def forward_bytes(config: Config, batch: int, tokens: int, itemsize: int) -> int:
    """Estimate what a forward pass takes beside the weights: a layer's activations, and one position's logits."""
    footprint = Footprint.of(config, batch, tokens, itemsize)
    return footprint.layer + footprint.target + footprint.unpacked + 4 * batch * config.vocab_size


def _train(config: Config, dtype: np.dtype, usable: int, tokens: int) -> FitEntry:
    """Estimate training by AdamW, one sequence at a time: packed experts have no gradient."""
    footprint = Footprint.of(config, 1, tokens, dtype.itemsize)
    parameters = Decoder.abstract(config).num_parameters
    # logits and their gradient in float32
    activations = footprint.kept(0) + footprint.target + 2 * 4 * tokens * config.vocab_size
    size, weights = _TRAINED * parameters + activations, 4 * parameters
    about = {"work": f"train on {tokens} tokens at a time", "fits": size <= usable, "bytes": size, "weights": weights}
    return cast(FitEntry, about | {"options": "AdamW, float32 weights", "dtype": dtype.name, "experts": ""})
