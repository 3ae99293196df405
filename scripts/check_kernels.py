"""Compare kernels with what stands in for them elsewhere, at published shapes on a Hopper GPU.

    python scripts/check_kernels.py --model gpt-oss-20b --layers 2

Experts' products with padded batched ones (for packed experts, with unpacking beforehand), and cuDNN's attention with
attention by blocks. Random weights, bfloat16.
Prints how far logits and relevance of both differ (a share of the largest value), and fails if that is more than
bfloat16 explains, or if a program does not hold the kernel. Where rounding sends a token to other experts, whose slots
then are others', the next prompt is taken.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import numpy as np
from bench_devices import difference, relevances

from moejax.models import Packed
from moejax.ops.attention import choice
from moejax.ops.experts import hopper, packed
from moejax.rules import AttnLRP, Backtrace
from moejax.study.bench import published, random_decoder
from moejax.study.bench.cases import forward

TOLERANCE = 0.02
PROMPTS = 64
"""At most. Of 300 tokens (all layers) of GPT-OSS rounding in attention sends one or two elsewhere."""

Kernels = dict[str, tuple[tuple[ModuleType, ...], str]]
"""Who decides for each, and how a program names it (a pattern: functions on the way there are named in it too)."""


def kernels(model: str) -> Kernels:
    full, attention = ((hopper,), r"grouped_matmul_\d"), ((choice,), "fmha")
    # without the kernel for packed matrices ours for full ones must not stand in for it
    in_mxfp4 = (packed, hopper), r"packed_matmul_hopper_\d"
    return {"experts": in_mxfp4 if model.endswith("-packed") else full, "attention": attention}


def compiled(
    function: Callable, weights: Packed, tokens: jax.Array, kernels: Kernels, without: str | None = None
) -> Callable[[jax.Array], Any]:
    """The program as a function of a prompt, on the host."""
    jax.clear_caches()
    with ExitStack() as stack:
        for module in kernels[without][0] if without is not None else ():
            stack.enter_context(mock.patch.object(module, "fits", return_value=False))
        program = jax.jit(lambda w, t: function(w, t)).lower(weights, tokens).compile()
    for name, (_, called) in kernels.items():
        assert (re.search(called, program.as_text() or "") is not None) == (name != without), (
            f"{name}: the kernel is not where it should be"
        )
    return lambda tokens: jax.device_get(program(weights, tokens))


def compared(ours: Callable, theirs: Callable, prompts: Iterable[jax.Array]) -> tuple[float, int]:
    """How far both differ on the first prompt whose tokens they send to the same experts, and which it is."""
    for n, tokens in enumerate(prompts):
        (*mine, ids), (*other, others) = ours(tokens), theirs(tokens)
        if all(map(np.array_equal, jax.tree.leaves(ids), jax.tree.leaves(others))):
            return difference(mine, other), n
    raise AssertionError("of every prompt some tokens are sent to other experts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    config, used = published(args.model), kernels(args.model)
    weights = Packed.of(random_decoder(replace(config, blocks=config.blocks[: args.layers])))
    shape = 1, args.tokens
    prompts = [jax.random.randint(jax.random.key(n), shape, 0, config.vocab_size) for n in range(PROMPTS)]
    # of all the last is where tokens are sent
    cases = {"forward": forward, "AttnLRP, 3 targets": relevances(AttnLRP(), 3), "Backtrace": relevances(Backtrace())}
    for name, function in cases.items():
        ours = compiled(function, weights, prompts[0], used)
        for kernel in used:
            found, passed = compared(ours, compiled(function, weights, prompts[0], used, without=kernel), prompts)
            where = f" ({passed} prompts were routed otherwise)" if passed else ""
            print(f"{args.model}, {name}: differs by {found:.1e} without the kernel of {kernel}{where}", flush=True)
            assert found <= TOLERANCE, f"{name} differs by more than {TOLERANCE}"


if __name__ == "__main__":
    main()
