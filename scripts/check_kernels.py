"""Compare kernels with what stands in for them elsewhere, at published shapes on a Hopper GPU.

    python scripts/check_kernels.py --model gpt-oss-20b --layers 2

Experts' products with padded batched ones (for packed experts, with unpacking beforehand), and cuDNN's attention with
attention by blocks. Random weights, bfloat16.
Prints how far logits and relevance of both differ (a share of the largest value), and fails if that is more than
bfloat16 explains, or if a program does not hold the kernel.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from unittest import mock

import jax
from bench_devices import difference, relevances

from moejax.models import Packed
from moejax.ops.attention import choice
from moejax.ops.experts import hopper, packed
from moejax.rules import AttnLRP, Backtrace
from moejax.study.bench import published, random_decoder
from moejax.study.bench.cases import forward

TOLERANCE = 0.02

Kernels = dict[str, tuple[ModuleType, str]]
"""Who decides for each, and how a program names it."""


def kernels(model: str) -> Kernels:
    experts = (packed, "packed_matmul_hopper") if model.endswith("-packed") else (hopper, "grouped_matmul")
    return {"experts": experts, "attention": (choice, "fmha")}


def run(function: Callable, weights: Packed, tokens: jax.Array, kernels: Kernels, without: str | None = None) -> object:
    jax.clear_caches()
    with ExitStack() as stack:
        if without is not None:
            stack.enter_context(mock.patch.object(kernels[without][0], "fits", return_value=False))
        program = jax.jit(lambda w, t: function(w, t)).lower(weights, tokens).compile()
    for name, (_, called) in kernels.items():
        assert (called in (program.as_text() or "")) == (name != without), (
            f"{name}: the kernel is not where it should be"
        )
    return jax.device_get(program(weights, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    config, used = published(args.model), kernels(args.model)
    weights = Packed.of(random_decoder(replace(config, blocks=config.blocks[: args.layers])))
    tokens = jax.random.randint(jax.random.key(1), (1, args.tokens), 0, config.vocab_size)
    cases = {
        "forward": lambda w, t: forward(w, t)[0],
        "AttnLRP, 3 targets": lambda w, t: relevances(AttnLRP(), 3)(w, t)[:-1],
        "Backtrace": lambda w, t: relevances(Backtrace())(w, t)[:-1],
    }
    for name, function in cases.items():
        ours = run(function, weights, tokens, used)
        for kernel in used:
            found = difference(ours, run(function, weights, tokens, used, without=kernel))
            print(f"{args.model}, {name}: differs by {found:.1e} without the kernel of {kernel}", flush=True)
            assert found <= TOLERANCE, f"{name} differs by more than {TOLERANCE}"


if __name__ == "__main__":
    main()
