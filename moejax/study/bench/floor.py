"""What a machine could do at best: its measured limits, and the least that a case must read and multiply."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.checkpoints.plan import leaf_paths
from moejax.models import Config, Decoder
from moejax.study.bench.cases import Case

_PATIENCE = 10.0
"""Seconds after which a case is not repeated any more, if it ran three times."""


class Ceilings(NamedTuple):
    """Measured limits of a device.

    Attributes:
        bandwidth: bytes a second that a large copy reads and writes.
        rate: operations a second of a large bfloat16 product.
    """

    bandwidth: float
    rate: float


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call in ms, its results awaited; two calls to warm up before."""
    times: list[float] = []
    begun = time.perf_counter()
    for i in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if i >= 2:
            times.append((time.perf_counter() - start) * 1e3)
        if len(times) >= 3 and time.perf_counter() - begun > _PATIENCE:
            break
    return statistics.median(times)


def queued_ms(run: Callable[[], object], repeats: int, awaited_ms: float) -> float:
    """Mean time of a call in ms, of calls that do not wait for each other's results; awaited ones take so long."""
    count = max(2, min(repeats, int(_PATIENCE * 1e3 / awaited_ms)))
    start = time.perf_counter()
    for _ in range(count - 1):
        run()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) * 1e3 / count


def ceilings() -> Ceilings:
    """Measured on the default device; with small arrays on a CPU."""
    small = jax.default_backend() == "cpu"
    buffer = jnp.zeros(1 << (22 if small else 30), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * buffer.nbytes / median_ms(lambda: copy(buffer), 10) * 1e3
    side = 512 if small else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return Ceilings(bandwidth, 2 * side**3 / median_ms(lambda: product(a, a), 10) * 1e3)


def floor_ms(decoder: Decoder, case: Case, tokens: int, limits: Ceilings) -> float:
    """The sum over passes of the larger of two times: reading the weights, and multiplying the active ones.

    A forward pass multiplies every token once, a backward pass once for each target. Attention multiplies each query
    with the keys that it sees and their pattern with the values, on the way back twice as much. A decoded token reads
    the experts that it uses and no others.
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
        # the head multiplies one position only
        per_token += used * values if path not in ("head", "embedding") else 0
    if case.passes == 0:
        return active / limits.bandwidth * 1e3
    reading = total / limits.bandwidth
    linear, attention = 2 * per_token * tokens / limits.rate, _attention(config, tokens) / limits.rate
    forward = max(reading, linear + attention)
    backward = max(reading, case.targets * (linear + 2 * attention)) if case.passes > 1 else 0.0
    # the second begins when the first has ended: neither could use time that the other leaves
    return (forward + backward) * 1e3


def _attention(config: Config, tokens: int) -> float:
    """Operations of the two products of all layers' attention, forward."""
    total = 0.0
    for block in config.blocks:
        a = block.half("attention").sizes
        window = a.window or tokens
        seen = sum(min(t, window) for t in range(1, tokens + 1))
        total += 4.0 * seen * a.num_heads * a.head_dim
    return total
