"""Time forward pass, relevance and decoding on all devices of a host, and on one device for comparison.

    python scripts/bench_devices.py --model qwen3-30b-a3b --layers 12

Weights are random, of a published shape, in bfloat16; times are medians. Each layout has one row for each case: time in
milliseconds, how many times as fast as one device, and the largest difference from the results of one device, as a
share of the largest value. Entries of the ledger are left out, because they are differences near zero. For decoding,
the tokens are compared. Tokens that rounding sends to other experts are counted, because their slots cannot be
compared.

Cases: "relevance" for one target, "targets" for 16 targets, "decode" for one prompt, "prompts" for 8 prompts, and
"forward". ``--layers`` builds fewer layers of the same shape, to save compilation. ``--toy`` builds small shapes, to
try the script on emulated devices.
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
from moejax.models import Decoder, FlatDecoder, ShardingRules, shard
from moejax.rules import AttnLRP, Rule
from moejax.study.bench import published, random_decoder
from moejax.study.bench.cases import decode_function, forward, relevance_function

DECODED = 32
TARGETS, SEQUENCES = 16, 8


def layouts(devices: int) -> dict[str, tuple[dict[str, int], ShardingRules]]:
    """Return meshes over all devices with their sharding rules, by name.

    Each mesh is a mapping from mesh axis to size.
    """
    meshes: dict[str, tuple[dict[str, int], ShardingRules]] = {
        "data": ({"data": devices}, {}),
        "expert": ({"expert": devices}, EXPERT),
        "tensor": ({"tensor": devices}, TENSOR),
    }
    if devices > 2 and devices % 2 == 0:
        meshes["expert x tensor"] = {"expert": 2, "tensor": devices // 2}, EXPERT_TENSOR
    return meshes


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Return the median in milliseconds, the seconds of the first call, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    first, times = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times)), first, result


def difference(result: object, expected: object) -> float:
    """Return the largest difference over all arrays, each as a share of the largest value of ``expected``."""
    pairs = zip(*([np.asarray(x, np.float64) for x in jax.tree.leaves(r)] for r in (result, expected)), strict=True)
    # np.max returns NaN if any difference is NaN; Python's max might not
    return float(np.max([np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30) for a, b in pairs]))


def relevances(rule: Rule, targets: int = 1) -> Callable[[FlatDecoder, jax.Array], tuple]:
    """Return a function that gives relevance at the gates, targets, logits and the ids of all routed experts.

    It leaves out the ledger's entries, which are differences near zero.
    """

    def run(weights: FlatDecoder, tokens: jax.Array) -> tuple:
        found = relevance_function(rule, targets)(weights, tokens)
        routes = [r.ids for r in (found.routes, found.attention_routes) if r is not None]
        return found.gates, found.target, found.logits, jnp.concatenate(routes, axis=-1)

    return run


def routed_elsewhere(ids: jax.Array, expected: jax.Array) -> str:
    """Count tokens, in every layer, that have other experts or the same experts in another order."""
    different = np.any(np.asarray(ids) != np.asarray(expected), -1)
    return f"{different.sum()} of {different.size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="layers to build; by default all")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=10, help="calls to take the median over")
    parser.add_argument("--cases", default="relevance,targets,decode,prompts,forward", help="comma-separated")
    parser.add_argument("--toy", action="store_true", help="small shapes")
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
    for layout, split in [("one device", None), *layouts(len(devices)).items()]:
        sharded: Decoder = decoder
        if split is not None:
            mesh_axes, sharding = split
            if args.toy:  # the vocabulary of the toy shape is a prime number and cannot be split
                sharding = {name: axis for name, axis in sharding.items() if name != "vocab"}
            sharded = shard(decoder, jax.make_mesh(tuple(mesh_axes.values()), tuple(mesh_axes)), sharding)
        weights = FlatDecoder.of(sharded)
        for name, (function, given) in chosen.items():
            ms, compiling, result = timed(lambda f=function, w=weights, t=given: f(w, t), args.repeats)
            if split is None:
                reference[name] = ms, jax.device_get(result)
            base, expected = reference[name]
            per = f", {ms / DECODED:.2f} ms a token" if name in ("decode", "prompts") else ""
            result = jax.device_get(result)
            routed = ""
            if name in ("relevance", "targets"):
                routed = f", tokens sent to other experts: {routed_elsewhere(result[-1], expected[-1])}"
                result, expected = result[:-1], expected[:-1]
            print(
                f"{layout:16} {name:10} {ms:8.2f} ms{per}, {base / ms:.2f} x one device, first call {compiling:.0f} s, "
                f"differs by {difference(result, expected):.1e}{routed}",
                flush=True,
            )


if __name__ == "__main__":
    main()
