"""Compare the kernel for Hopper GPUs with padded batched products, at published shapes on such a GPU.

    python scripts/check_kernel.py --model olmoe-1b-7b --layers 2

Random weights, bfloat16. Prints how far logits and relevance of both differ (a share of the largest value), and fails
if that is more than bfloat16 explains, or if a program does not hold the kernel.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import jax
from bench_devices import difference, relevances

from moejax.models import Packed
from moejax.ops.experts import hopper
from moejax.rules import AttnLRP, Backtrace
from moejax.study.bench import published, random_decoder
from moejax.study.bench.cases import forward

TOLERANCE = 0.02


def run(function: Callable, weights: Packed, tokens: jax.Array, *, kernel: bool) -> object:
    jax.clear_caches()
    with mock.patch.object(hopper, "fits", hopper.fits if kernel else lambda *_: False):
        program = jax.jit(lambda w, t: function(w, t)).lower(weights, tokens)
    assert ("mosaic_gpu" in program.as_text()) == kernel, "the kernel is where it should not be, or not where it should"
    return jax.device_get(program.compile()(weights, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    config = published(args.model)
    weights = Packed.of(random_decoder(replace(config, blocks=config.blocks[: args.layers])))
    tokens = jax.random.randint(jax.random.key(1), (1, args.tokens), 0, config.vocab_size)
    cases = {
        "forward": lambda w, t: forward(w, t)[0],
        "AttnLRP, 3 targets": relevances(AttnLRP(), 3),
        "Backtrace": relevances(Backtrace()),
    }
    for name, function in cases.items():
        found = difference(*(run(function, weights, tokens, kernel=kernel) for kernel in (True, False)))
        print(f"{args.model}, {name}: differs by {found:.1e}", flush=True)
        assert found <= TOLERANCE, f"{name} differs by more than {TOLERANCE}"


if __name__ == "__main__":
    main()
