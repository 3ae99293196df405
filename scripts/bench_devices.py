"""Forward pass, relevance and decoding over all devices of a host, beside one of them.

    python scripts/bench_devices.py --model qwen3-30b-a3b --layers 12

Random weights of published shapes, bfloat16; medians. For each layout: milliseconds, how many times faster than one
device, and how far the results are from that device's (a share of the largest value; entries of the ledger, which are
differences near zero, are left out; of decoding, the tokens are compared). Tokens that rounding sends to other experts
are counted: their slots are not comparable. "targets" is relevance for 16 targets, "prompts" decoding of 8 prompts.
With ``--layers`` fewer layers of the same shape are built, to save compilation. With ``--toy`` small shapes, for a try
on emulated devices.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import EXPERT, EXPERT_TENSOR, TENSOR
from moejax.models import Decoder, FlatDecoder, Rules, shard
from moejax.rules import AttnLRP, Rule
from moejax.study.bench import published, random_decoder
from moejax.study.bench.cases import decode_function, forward, relevance_function

DECODED = 32
TARGETS, SEQUENCES = 16, 8


def layouts(devices: int) -> dict[str, tuple[dict[str, int], Rules]]:
    """Meshes over all devices."""
    found: dict[str, tuple[dict[str, int], Rules]] = {
        "data": ({"data": devices}, {}),
        "expert": ({"expert": devices}, EXPERT),
        "tensor": ({"tensor": devices}, TENSOR),
    }
    if devices > 2 and devices % 2 == 0:
        found["expert x tensor"] = {"expert": 2, "tensor": devices // 2}, EXPERT_TENSOR
    return found


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Median milliseconds, seconds of the first call, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    first, times = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times)), first, result


def difference(ours: object, theirs: object) -> float:
    """The largest over all arrays of a result, each as a share of its largest value."""
    pairs = zip(*([np.asarray(x, np.float64) for x in jax.tree.leaves(r)] for r in (ours, theirs)), strict=True)
    # of what is not a number the largest is none either
    return float(np.max([np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30) for a, b in pairs]))


def relevances(rule: Rule, targets: int = 1) -> Callable[[FlatDecoder, jax.Array], tuple]:
    """Relevance at the gates, targets, logits and ids of all experts; the ledger's entries, near zero, are left out."""

    def run(weights: FlatDecoder, tokens: jax.Array) -> tuple:
        found = relevance_function(rule, targets)(weights, tokens)
        routes = [r.ids for r in (found.routes, found.attention_routes) if r is not None]
        return found.gates, found.target, found.logits, jnp.concatenate(routes, axis=-1)

    return run


def routed_elsewhere(ours: jax.Array, theirs: jax.Array) -> str:
    """How many tokens, counted in every layer, have other experts or the same in another order."""
    different = np.any(np.asarray(ours) != np.asarray(theirs), -1)
    return f"{different.sum()} of {different.size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cases", default="relevance,targets,decode,prompts,forward")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    config = published(args.model, toy=args.toy)
    if args.layers:
        config = replace(config, blocks=config.blocks[: args.layers])
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}; {args.model}, {config.num_layers} layers")
    decoder = random_decoder(config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
    print(f"{size / 1e9:.2f} GB of weights, {args.tokens} tokens", flush=True)
    tokens = jax.random.randint(jax.random.key(1), (1, args.tokens), 0, config.vocab_size)
    prompts = jax.random.randint(jax.random.key(2), (SEQUENCES, args.tokens), 0, config.vocab_size)
    functions = {
        "relevance": (jax.jit(relevances(AttnLRP())), tokens),
        "targets": (jax.jit(relevances(AttnLRP(), TARGETS)), tokens),
        "decode": (decode_function(1 + DECODED), tokens),
        "prompts": (decode_function(1 + DECODED), prompts),
        "forward": (jax.jit(lambda w, t: forward(w, t)[0]), tokens),
    }
    chosen = {name: functions[name] for name in args.cases.split(",")}
    reference: dict[str, tuple[float, Any]] = {}
    for layout, spread in [("one device", None), *layouts(len(devices)).items()]:
        placed: Decoder = decoder
        if spread is not None:
            axes, rules = spread
            if args.toy:  # whose vocabulary is a prime number
                rules = {name: axis for name, axis in rules.items() if name != "vocab"}
            placed = shard(decoder, jax.make_mesh(tuple(axes.values()), tuple(axes)), rules)
        weights = FlatDecoder.of(placed)
        for name, (function, given) in chosen.items():
            ms, compiling, result = timed(lambda f=function, w=weights, t=given: f(w, t), args.repeats)
            if spread is None:
                reference[name] = ms, jax.device_get(result)
            base, expected = reference[name]
            per = f", {ms / DECODED:.2f} ms a token" if name in ("decode", "prompts") else ""
            found = jax.device_get(result)
            routed = ""
            if name in ("relevance", "targets"):
                routed = f", tokens routed otherwise: {routed_elsewhere(found[-1], expected[-1])}"
                found, expected = found[:-1], expected[:-1]
            print(
                f"{layout:16} {name:10} {ms:8.2f} ms{per}, {base / ms:.2f} x one device, first call {compiling:.0f} s, "
                f"differs by {difference(found, expected):.1e}{routed}",
                flush=True,
            )


if __name__ == "__main__":
    main()
