"""Measure the cases one after another, and yield each row as soon as it is complete."""

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Int

from moejax.errors import MoejaxError
from moejax.lm import LM
from moejax.models import Decoder, FlatDecoder
from moejax.program import fast_tracing
from moejax.report.numbers import finite
from moejax.report.schema import SCHEMA, BenchEntry, BenchHeading
from moejax.study.bench.cases import CASES, NEW_TOKENS, Case, decode_function, forward
from moejax.study.bench.floor import DeviceLimits, device_limits, floor_ms, median_ms, queued_ms


@dataclass(frozen=True)
class BenchRow:
    """Measurements of one case.

    Attributes:
        case: name of the case.
        tokens: tokens of the prompt.
        ms: median wall time in ms; for decoding, of one new token.
        floor_ms: the least time in ms by the device's measured limits.
        queued_ms: mean time in ms of calls that are queued and awaited together, which hides the host's time to start
            them; 0 for decoding.
        call_ms: median wall time in ms of the public function, until its results are on the host; 0 if the case has
            none.
        targets_per_s: explained targets a second; 0 if nothing is explained.
        compile_s: seconds of tracing and compiling.
        cached_s: seconds of tracing and of loading the program from the persistent cache.
        peak_gb: GB of the program's arguments, temporaries and results.
        load: slots of the most loaded expert of any layer, over the mean; ``None`` if the case does not return routing.
        failed: why there are no measurements, such as too little memory.
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
        """``ms`` over ``floor_ms``; 0 without measurements."""
        return self.ms / self.floor_ms if self.floor_ms else 0.0

    def to_dict(self) -> BenchEntry:
        """Plain data for JSON, and for :func:`moejax.report.bench.row_line`."""
        return cast(BenchEntry, {"schema": SCHEMA} | finite(asdict(self)) | {"ratio": self.ratio})


def heading(name: str, decoder: Decoder, limits: DeviceLimits) -> BenchHeading:
    """Model, device, versions of packages, and measured limits of the device."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    return {
        "schema": SCHEMA,
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
) -> Iterator[BenchHeading | BenchRow]:
    """Yield the heading, then a row for each case, measured on random tokens.

    Args:
        name: name of the model in the heading.
        tokens, long_tokens: tokens of the prompt and of the long prompt.
        cases: names of the cases to run; a word that is not a name selects all cases that contain it.
        repeats: number of calls to take the median of; slow cases run fewer times, but at least three.

    Raises:
        MoejaxError: no case contains a word, or a prompt has fewer tokens than a case has targets.
    """
    chosen = _chosen(cases)
    short = max((case.targets for case in chosen), default=1)
    if min(tokens, long_tokens) < short:
        raise MoejaxError(f"a prompt of {min(tokens, long_tokens)} tokens is too short to explain its last {short}.")
    limits, lm = device_limits(), LM(decoder)
    yield heading(name, decoder, limits)
    for case in chosen:
        length = long_tokens if case.long else tokens
        ids = jax.random.randint(jax.random.key(1), (1, length + 1), 0, decoder.config.vocab_size)
        try:
            yield _row(case, lm, ids, limits, repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield BenchRow(case.name, length, failed="out of memory")


def _chosen(words: Sequence[str]) -> list[Case]:
    """The cases that the words name, in the order of :data:`CASES`."""
    names = [case.name for case in CASES]
    chosen = set()
    for word in words:
        matches = {word} if word in names else {name for name in names if word in name}
        if not matches:
            raise MoejaxError(f"no case is called {word!r}; there are {', '.join(names)}.")
        chosen |= matches
    return [case for case in CASES if case.name in chosen]


def _row(case: Case, lm: LM, ids: Int[Array, "1 T1"], limits: DeviceLimits, repeats: int) -> BenchRow:
    """Measure one case; all but the last of ``ids`` are the prompt."""
    decoder, flat, prompt, length = lm.decoder, lm.flat, ids[:, :-1], ids.shape[1] - 1
    run, compile_s, cached_s = _compiled(case.function, flat, prompt)
    memory = run.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    call = partial(run, flat, prompt)
    ms, queued = median_ms(call, repeats), 0.0
    if case.passes:
        queued = queued_ms(call, repeats, ms)
    else:
        # the forward pass over the prompt chooses the first token; its time is subtracted
        first = jax.jit(decode_function(1)).lower(flat, prompt).compile()
        ms = (ms - median_ms(partial(first, flat, prompt), repeats)) / NEW_TOKENS
    called = median_ms(partial(case.call, lm, ids[0].tolist()), repeats) if case.call else 0.0
    load = _largest_load(run(flat, prompt)[1], decoder.config.num_experts) if case.function is forward else None
    return BenchRow(
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


def _compiled(function: Callable, flat: FlatDecoder, prompt: Array) -> tuple[Any, float, float]:
    """The compiled program; seconds to trace and compile it; seconds to trace it and load it from a cache."""
    program, times = None, []
    with _persistent_cache(), fast_tracing:
        for _ in range(2):
            # forget what was traced or compiled before
            jax.clear_caches()
            start = time.perf_counter()
            program = jax.jit(lambda weights, tokens: function(weights, tokens)).lower(flat, prompt).compile()
            times.append(time.perf_counter() - start)
    return program, *times


@contextmanager
def _persistent_cache() -> Iterator[None]:
    """Use a new, empty compilation cache inside of the context."""
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
    """Slots of the most loaded expert of any layer, over the mean; ``None`` without layers."""
    if not layers:
        return None
    counts = jnp.stack([jnp.bincount(ids.ravel(), length=experts) for ids in layers])
    return float((counts.max(-1) / counts.mean(-1)).max())
