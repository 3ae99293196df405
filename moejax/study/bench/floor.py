"""The least time that a case could take: measured limits of the device, and the bytes and operations of the case."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.checkpoints.plan import leaf_paths
from moejax.models import Config, Decoder
from moejax.study.bench.cases import Case

_TIME_LIMIT = 10.0
"""Seconds after which a case that ran three times is not repeated."""


class DeviceLimits(NamedTuple):
    """Measured limits of a device.

    Attributes:
        bandwidth: bytes a second that a large copy reads and writes, counted together.
        rate: operations a second of a large bfloat16 matrix product.
    """

    bandwidth: float
    rate: float


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median wall time in ms of a call that waits for its results, after two calls to warm up."""
    times: list[float] = []
    begun = time.perf_counter()
    for i in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e3)
        if len(times) >= 3 and time.perf_counter() - begun > _TIME_LIMIT:
            break
    return statistics.median(times)


def queued_ms(run: Callable[[], object], repeats: int, awaited_ms: float) -> float:
    """Mean time in ms of a call when calls are queued and only the last result is awaited.

    Args:
        repeats: number of calls; fewer if a call is slow, but at least two.
        awaited_ms: time of a call that waits for its results, as :func:`median_ms` measures it.
    """
    count = max(2, min(repeats, int(_TIME_LIMIT * 1e3 / awaited_ms)))
    start = time.perf_counter()
    for _ in range(count - 1):
        run()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) * 1e3 / count


def device_limits() -> DeviceLimits:
    """Measure the limits of the default device; on a CPU with small arrays."""
    small = jax.default_backend() == "cpu"
    buffer = jnp.zeros(1 << (22 if small else 30), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * buffer.nbytes / median_ms(lambda: copy(buffer), 10) * 1e3
    side = 512 if small else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return DeviceLimits(bandwidth, 2 * side**3 / median_ms(lambda: product(a, a), 10) * 1e3)


def floor_ms(decoder: Decoder, case: Case, tokens: int, limits: DeviceLimits) -> float:
    """The least time in ms: for each pass the time to read all weights or to multiply, whichever is longer.

    A forward pass multiplies the active weights with every token once, a backward pass once for each target. Attention
    multiplies each query with the keys that it sees, and the pattern with the values; a backward pass takes twice as
    many operations. A decoded token reads only the experts that it uses.
    """
    config = decoder.config
    share = {"feed_forward": config.num_selected / max(1, config.num_experts)}
    if config.num_attention_experts:
        share["attention"] = config.num_attention_selected / config.num_attention_experts
    total = active = per_token = 0.0
    for path, leaf in leaf_paths(decoder):
        if path == "embedding" and decoder.head is not None:
            continue
        part = path.split(".")[2] if path.startswith("layers") else ""
        used = share.get(part, 1.0) if config.role(path) == "expert" else 1.0
        total, active = total + leaf.nbytes, active + used * leaf.nbytes
        values = leaf.size * 2 if path.endswith("blocks") else 0 if path.endswith("scales") else leaf.size
        # the head multiplies only one position
        per_token += used * values if path not in ("head", "embedding") else 0
    if case.passes == 0:
        return active / limits.bandwidth * 1e3
    reading = total / limits.bandwidth
    linear, attention = 2 * per_token * tokens / limits.rate, _attention(config, tokens) / limits.rate
    forward = max(reading, linear + attention)
    backward = max(reading, case.targets * (linear + 2 * attention)) if case.passes > 1 else 0.0
    # the backward pass begins when the forward pass has ended, so the two cannot overlap
    return (forward + backward) * 1e3


def _attention(config: Config, tokens: int) -> float:
    """Operations of a forward pass in the two matrix products of attention, summed over layers."""
    total = 0.0
    for block in config.blocks:
        a = block.half("attention").sizes
        window = a.window or tokens
        seen = sum(min(t, window) for t in range(1, tokens + 1))
        total += 4.0 * seen * a.num_heads * a.head_dim
    return total
