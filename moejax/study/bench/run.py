"""Measure case after case, each row as soon as it is there."""

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Int

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.models import Decoder, FlatDecoder
from moejax.program import fast_tracing
from moejax.study.bench.cases import CASES, DECODED, Case, decoding, forward
from moejax.study.bench.floor import Ceilings, ceilings, floor_ms, median_ms, queued_ms


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        tokens: of the prompt.
        ms: median wall time, of decoding a new token's.
        floor_ms: the least that the machine could take, by its measured limits.
        queued_ms: mean time of a call where calls follow one another and only the last is waited for, which leaves out
            what the host takes to start one; 0 for decoding.
        call_ms: median wall time of the public function that does it, its results on the host; 0 for what is not timed
            so.
        targets_per_s: explained targets a second; 0 where nothing is explained.
        compile_s: tracing and compiling.
        cached_s: tracing, and loading the program from the persistent cache.
        peak_gb: arguments, temporaries and results of the program.
        load: slots of the most loaded expert of any layer, over the mean; known where the routing is returned.
        failed: why there are no figures, such as too little memory.
    """

    case: str
    tokens: int
    ms: float = 0.0
    floor_ms: float = 0.0
    queued_ms: float = 0.0
    call_ms: float = 0.0
    targets_per_s: float = 0.0
    compile_s: float = 0.0
    cached_s: float = 0.0
    peak_gb: float = 0.0
    load: float | None = None
    failed: str | None = None

    @property
    def ratio(self) -> float:
        """How many times the floor; 0 without figures."""
        return self.ms / self.floor_ms if self.floor_ms else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"ratio": self.ratio}


def heading(name: str, decoder: Decoder, limits: Ceilings) -> dict[str, Any]:
    """Model, device, versions and measured limits."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    return {
        "model": name,
        "weights_gb": weights / 1e9,
        "dtype": str(decoder.embedding.dtype),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
        "tb_per_s": limits.bandwidth / 1e12,
        "tflop_per_s": limits.rate / 1e12,
    }


def bench(
    name: str,
    decoder: Decoder,
    *,
    tokens: int = 512,
    long_tokens: int = 4096,
    cases: Sequence[str] = ("",),
    repeats: int = 20,
) -> Iterator[dict[str, Any] | Row]:
    """First the heading, then a row for each case, on random tokens.

    Args:
        cases: run those of these names; what is no name stands for all that contain it.
        repeats: calls to take the median of; fewer of slow cases, but three.

    Raises:
        MoejaxError: a word that no case contains, or a prompt of fewer tokens than a case has targets.
    """
    chosen = _chosen(cases)
    short = max((case.targets for case in chosen), default=1)
    if min(tokens, long_tokens) < short:
        raise MoejaxError(f"a prompt of {min(tokens, long_tokens)} tokens is too short to explain its last {short}.")
    limits, lm = ceilings(), LM(decoder)
    yield heading(name, decoder, limits)
    for case in chosen:
        length = long_tokens if case.long else tokens
        ids = jax.random.randint(jax.random.key(1), (1, length + 1), 0, decoder.config.vocab_size)
        try:
            yield _row(case, lm, ids, limits, repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield Row(case.name, length, failed="out of memory")


def _chosen(words: Sequence[str]) -> list[Case]:
    names = [case.name for case in CASES]
    meant = set()
    for word in words:
        found = {word} if word in names else {name for name in names if word in name}
        if not found:
            raise MoejaxError(f"no case is called {word!r}; there are {', '.join(names)}.")
        meant |= found
    return [case for case in CASES if case.name in meant]


def _row(case: Case, lm: LM, ids: Int[Array, "1 T1"], limits: Ceilings, repeats: int) -> Row:
    """All but the last of ``ids`` are the prompt."""
    decoder, packed, prompt, length = lm.decoder, lm.flat, ids[:, :-1], ids.shape[1] - 1
    run, compile_s, cached_s = _compiled(case.function, packed, prompt)
    memory = run.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    call = partial(run, packed, prompt)
    ms, queued = median_ms(call, repeats), 0.0
    if case.passes:
        queued = queued_ms(call, repeats, ms)
    else:
        # the prompt's own pass chooses the first token
        first = jax.jit(decoding(1)).lower(packed, prompt).compile()
        ms = (ms - median_ms(partial(first, packed, prompt), repeats)) / DECODED
    called = median_ms(partial(case.call, lm, ids[0].tolist()), repeats) if case.call else 0.0
    load = _largest_load(run(packed, prompt)[1], decoder.config.num_experts) if case.function is forward else None
    return Row(
        case.name,
        length,
        ms=ms,
        floor_ms=floor_ms(decoder, case, length, limits),
        queued_ms=queued,
        call_ms=called,
        targets_per_s=case.targets / ms * 1e3,
        compile_s=compile_s,
        cached_s=cached_s,
        peak_gb=peak / 1e9,
        load=load,
    )


def _compiled(function: Callable, packed: FlatDecoder, prompt: Array) -> tuple[Any, float, float]:
    """The compiled program, and the seconds that it took, traced and compiled, and traced and found in a cache."""
    program, times = None, []
    with _persistent_cache(), fast_tracing:
        for _ in range(2):
            # nothing that was traced or compiled before
            jax.clear_caches()
            start = time.perf_counter()
            program = jax.jit(lambda weights, tokens: function(weights, tokens)).lower(packed, prompt).compile()
            times.append(time.perf_counter() - start)
    return program, *times


@contextmanager
def _persistent_cache() -> Iterator[None]:
    """A new and empty one for the time being."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in zip(names, (folder, 0, -1), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _largest_load(layers: list[Array], experts: int) -> float | None:
    if not layers:
        return None
    counts = jnp.stack([jnp.bincount(ids.ravel(), length=experts) for ids in layers])
    return float((counts.max(-1) / counts.mean(-1)).max())
