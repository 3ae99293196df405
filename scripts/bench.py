"""Time forward, gradient and relevance of a published architecture with random bfloat16 weights.

    python scripts/bench.py                           # OLMoE-1B-7B, 512 tokens: needs a GPU with 24 GB or more
    python scripts/bench.py --model qwen3-30b-a3b     # needs 80 GB
    python scripts/bench.py --toy                     # a small model, to see that everything runs

Medians after warm-up. The floor beside each figure is the larger of two times: reading the weights at the bandwidth of
a large copy, and the products with the active weights at the rate of a large bfloat16 product; both measured here. A
decoded token reads only the experts that it uses.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from moejax.checkpoints.plan import leaf_paths
from moejax.models import Config, Decoder, Packed, family, unpack
from moejax.relevance.engine import LogitSeeds, relevance
from moejax.rules import GIM, AttnLRP, Backtrace, Gates, Plain, Reading, Rule

OLMOE_1B_7B = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
JETMOE_8B = {
    "model_type": "jetmoe",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "kv_channels": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MODELS = {
    "olmoe-1b-7b": OLMOE_1B_7B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-20b-packed": GPT_OSS_20B,
    "jetmoe-8b": JETMOE_8B,
}
TOY = {"vocab_size": 503, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
DECODED = 64


class Case(NamedTuple):
    """A function of the decoder and the tokens; how often it reads all weights (0: a token's own); its targets."""

    name: str
    function: Callable
    passes: int
    targets: int


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, its results awaited; two warm-up calls before."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def ceilings(toy: bool) -> tuple[float, float]:
    """Bytes per second of a large copy (read and written), operations per second of a large bfloat16 product."""
    buffer = jnp.zeros(1 << (22 if toy else 30), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    bandwidth = 2 * buffer.nbytes / median_ms(lambda: copy(buffer), 10) * 1e3
    side = 512 if toy else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return bandwidth, 2 * side**3 / median_ms(lambda: product(a, a), 10) * 1e3


def random_decoder(config: Config) -> Decoder:
    """Random weights, leaf by leaf, so that initialising takes no more memory than running.

    Unit variance for the embedding and small output projections keep the tokens of a random model apart, so that its
    routers spread them as a trained model's do; otherwise a few experts get nearly every token.
    """
    abstract = Decoder.abstract(config, jnp.bfloat16)
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    filled = []
    for i, (path, leaf) in enumerate(leaf_paths(abstract)):
        is_output = path.endswith(("attention.output.weight", ".down"))
        if leaf.ndim == 1:  # norms of one, biases of none: what all tokens share would make them alike
            filled.append(jnp.full(leaf.shape, 0 if path.endswith("bias") else 1, leaf.dtype))
            continue
        scale = 1.0 if path == "embedding" else 0.02 / (2 * config.num_layers) ** 0.5 if is_output else 0.02
        if leaf.dtype == jnp.uint8:  # packed experts: any codes, a scale of 2^-7
            code = jax.random.bits(jax.random.key(i), leaf.shape, jnp.uint8)
            filled.append(code if path.endswith("blocks") else jnp.full(leaf.shape, 120, jnp.uint8))
            continue
        random = make(jax.random.fold_in(jax.random.key(0), i), leaf.shape)
        filled.append(random * scale)
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def largest_load(decoder: Decoder, tokens: jax.Array) -> float:
    """Slots of the most loaded expert of any layer, over the mean."""
    ids = jnp.stack([r.feed_forward.ids for r in jax.jit(Decoder.hidden)(decoder, tokens).routing])
    counts = jax.vmap(lambda i: jnp.bincount(i.ravel(), length=decoder.config.num_experts))(ids)
    return float(counts.max() / counts.mean())


def floor_ms(decoder: Decoder, case: Case, tokens: int, bandwidth: float, rate: float) -> float:
    """The larger of the weights' reading time and the active weights' multiplication time."""
    config = decoder.config
    share = {"feed_forward": config.num_selected / config.num_experts}
    if config.num_attention_experts:
        share["attention"] = config.num_attention_selected / config.num_attention_experts
    total = active = per_token = 0.0
    for path, leaf in leaf_paths(decoder):
        if path == "embedding" and decoder.head is not None:
            continue
        part = path.split(".")[2] if path.startswith("layers") else ""
        used = share.get(part, 1.0) if leaf.ndim > 2 else 1.0
        total, active = total + leaf.nbytes, active + used * leaf.nbytes
        values = leaf.size * 2 if path.endswith("blocks") else 0 if path.endswith("scales") else leaf.size
        # the head multiplies one position only
        per_token += used * values if path not in ("head", "embedding") else 0
    if case.passes == 0:
        return active / bandwidth * 1e3
    # a forward pass multiplies every token once, a backward pass once for each target
    multiplying = 2 * per_token * tokens * (1 + (case.passes - 1) * case.targets) / rate
    return max(case.passes * total / bandwidth, multiplying) * 1e3


def forward(decoder: Decoder, tokens: jax.Array, reading: Reading = Reading()) -> jax.Array:
    """Logits of the last position."""
    return decoder.logits(decoder.hidden(tokens, reading=reading).stream[:, -1:], reading)


def gradient(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Gradient times input of the largest logit, per token."""
    ones = jnp.ones((decoder.config.num_layers + 1, *tokens.shape))
    return jax.grad(lambda g: forward(decoder, tokens, Reading(Plain(), Gates(tokens=g))).max())(ones)[0]


def explain(rule: Rule, targets: int) -> Callable:
    """Relevance at all gates for the ``targets`` last positions."""

    def run(decoder: Decoder, tokens: jax.Array) -> object:
        length = tokens.shape[1]
        positions = jnp.arange(length - targets, length, dtype=jnp.int32)[None]
        seeds = LogitSeeds.of(positions, jnp.full((1, targets, 1), -1, jnp.int32), jnp.ones((1, targets, 1)))
        return relevance(decoder, tokens, jnp.ones(tokens.shape, bool), seeds, Gates(), rule=rule)

    return run


def decode(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Greedy continuation by :data:`DECODED` tokens, the whole loop on the device."""
    cache = decoder.empty_cache(1, tokens.shape[1] + DECODED)
    hidden = decoder.hidden(tokens, cache=cache)
    first = decoder.logits(hidden.stream[:, -1:]).argmax(-1)

    def step(state: tuple, _: None) -> tuple:
        token, cache = state
        hidden = decoder.hidden(token, cache=cache)
        return (decoder.logits(hidden.stream).argmax(-1), hidden.cache), token

    return jax.lax.scan(step, (first, hidden.cache), length=DECODED)[1]


CASES = [
    Case("forward, last position's logits", forward, 1, 1),
    Case("gradient of one logit", gradient, 2, 1),
    Case("Plain, all gates, 1 target", explain(Plain(), 1), 2, 1),
    Case("AttnLRP, all gates, 1 target", explain(AttnLRP(), 1), 2, 1),
    Case("AttnLRP, all gates, 16 targets", explain(AttnLRP(), 16), 2, 16),
    Case("GIM, all gates, 1 target", explain(GIM(), 1), 2, 1),
    Case("Backtrace, all gates, 1 target", explain(Backtrace(), 1), 2, 1),
    Case("decode, a token", decode, 0, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--model", choices=MODELS, default="olmoe-1b-7b")
    parser.add_argument("--cases", help="run those whose name contains one of these words, separated by commas")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    console, device = Console(width=150), jax.devices()[0]
    bandwidth, rate = ceilings(args.toy)
    published = MODELS[args.model] | (TOY if args.toy else {})
    config = family(published["model_type"]).config(published)
    decoder = random_decoder(config.pack() if args.model.endswith("packed") else config)
    packed = Packed.of(decoder)
    weights = sum(p.nbytes for p in jax.tree.leaves(decoder)) / 1e9
    tokens = jax.random.randint(jax.random.key(1), (1, args.tokens), 0, decoder.config.vocab_size)
    title = (
        f"{'toy' if args.toy else args.model}, T={args.tokens}, {weights:.2f} GB, {device.device_kind}, "
        f"jax {jax.__version__}, flax {flax.__version__}, {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s, "
        f"largest expert load {largest_load(decoder, tokens):.2f}x the mean"
    )
    table = Table("case", "ms", "floor ms", "ratio", "compile s", "peak GB", title=title, title_justify="left")
    rows = []
    words = args.cases.split(",") if args.cases else [""]
    for case in (case for case in CASES if any(word in case.name for word in words)):
        start = time.perf_counter()
        function = jax.jit(lambda weights, tokens, case=case: case.function(unpack(weights), tokens))
        memory = function.lower(packed, tokens).compile().memory_analysis()
        seconds = time.perf_counter() - start
        ms = median_ms(partial(function, packed, tokens), args.repeats)
        if case.passes == 0:  # less the prompt's own pass
            first = jax.jit(lambda weights, tokens: forward(unpack(weights), tokens))
            ms = (ms - median_ms(partial(first, packed, tokens), args.repeats)) / DECODED
        floor = floor_ms(decoder, case, args.tokens, bandwidth, rate)
        peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
        rows.append({"case": case.name, "ms": ms, "floor_ms": floor, "compile_s": seconds, "peak_gb": peak})
        table.add_row(case.name, f"{ms:.2f}", f"{floor:.2f}", f"{ms / floor:.2f}", f"{seconds:.1f}", f"{peak:.2f}")
    console.print(table)
    stats = device.memory_stats() or {}
    console.print(
        f"peak allocated in the whole run: {stats.get('peak_bytes_in_use', 0) / 1e9:.2f} GB (0: not reported)"
    )
    if args.json:
        args.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
