"""Compare kernels with what stands in for them elsewhere, at published shapes on a Hopper GPU.

    python scripts/check_kernels.py --model gpt-oss-20b --layers 2

Experts' products with padded batched ones (for packed experts, with unpacking beforehand), and cuDNN's attention with
attention by blocks. Random weights, bfloat16.
Prints how far logits and relevance of both differ (a share of the largest value), beside how far both are from those
of the same weights in float32, and fails if that is more than bfloat16 explains, or if a program does not hold the
kernel; two to four minutes a model. Rounding would send some tokens to other experts, whose slots then are others':
those that the program with all kernels selects are the only choices of the others.
"""

import argparse
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from bench_devices import difference

from moejax.models import Config, FlatDecoder
from moejax.ops.attention.registry import ATTENTIONS
from moejax.ops.experts.matmul.registry import MATMULS
from moejax.relevance.engine import Readout, Slots
from moejax.rules import AttnLRP, Gates, Proportional, Rule
from moejax.study.bench import published, random_decoder
from moejax.study.bench.cases import relevance_function

TOLERANCE = 0.02

Kernels = dict[str, tuple[tuple[Any, ...], str]]
"""For each kernel the registered implementations that may take it, and a pattern of its name in a compiled program."""


class Found(NamedTuple):
    """What is compared: relevance by slot is in the order of experts, in which the routes are too."""

    gates: Gates
    target: jax.Array
    logits: jax.Array
    routes: tuple[jax.Array, ...]


def kernels(model: str) -> Kernels:
    full = (MATMULS["hopper"],), r"grouped_matmul_\d"
    attention = (ATTENTIONS["fused"],), "fmha"
    # without the kernel for MXFP4, the kernel for bfloat16 must not replace it
    in_mxfp4 = (MATMULS["packed"], MATMULS["hopper"]), r"packed_matmul_hopper_\d"
    return {"experts": in_mxfp4 if model.endswith("-packed") else full, "attention": attention}


def relevance(weights: FlatDecoder, tokens: jax.Array, chosen: Gates, *, rule: Rule, targets: int) -> Found:
    """The ledger's entries, near zero, are left out."""
    found: Readout = relevance_function(rule, targets)(weights, tokens, chosen)
    slots, ids = by_expert(found.gates.slots, found.routes)
    attention_slots, attention_ids = by_expert(found.gates.attention_slots, found.attention_routes)
    gates = replace(found.gates, slots=slots, attention_slots=attention_slots)
    return Found(gates, found.target, found.logits, (*ids, *attention_ids))


def by_expert(slots: jax.Array | None, routes: Slots | None) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """Slots that differ little may change places."""
    if slots is None or routes is None:
        return None, ()
    order = jnp.argsort(routes.ids, axis=-1)
    return jnp.take_along_axis(slots, order[None], axis=-1), (jnp.take_along_axis(routes.ids, order, axis=-1),)


def only(config: Config, found: Found) -> Gates:
    """Gates by which a token may be routed to the experts found, and to no others."""
    counts = {"selectable": config.num_experts, "attention_selectable": config.num_attention_experts}
    routes = zip(counts.items(), found.routes, strict=False)
    return Gates(**{name: jax.nn.one_hot(ids, count).sum(-2) for (name, count), ids in routes})


def apart(ours: Found, theirs: Found) -> float:
    assert all(map(np.array_equal, ours.routes, theirs.routes)), "tokens are routed otherwise"
    return difference(jax.device_get(ours[:-1]), jax.device_get(theirs[:-1]))


def every(config: Config, tokens: jax.Array) -> Gates:
    ones = Gates.ones(config, tokens)
    return Gates(selectable=ones.experts, attention_selectable=ones.attention_experts)


def compiled(
    function: Callable, arguments: tuple[FlatDecoder, jax.Array, Gates], kernels: Kernels, without: str | None = None
) -> Callable[..., Any]:
    jax.clear_caches()
    with ExitStack() as stack:
        for implementation in kernels[without][0] if without is not None else ():
            stack.enter_context(mock.patch.object(implementation, "supports", return_value=False))
        program = jax.jit(lambda w, t, g: function(w, t, g)).lower(*arguments).compile()
    for name, (_, called) in kernels.items():
        assert (re.search(called, program.as_text() or "") is not None) == (name != without), (
            f"{name}: the kernel is not where it should be"
        )
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    config, used = published(args.model), kernels(args.model)
    config = replace(config, blocks=config.blocks[: args.layers])
    weights = FlatDecoder.of(random_decoder(config))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, weights)
    tokens = jax.random.randint(jax.random.key(0), (1, args.tokens), 0, config.vocab_size)
    cases = {"AttnLRP, 3 targets": (AttnLRP(), 3), "Backtrace": (Proportional(), 1)}
    for name, (rule, targets) in cases.items():
        function = partial(relevance, rule=rule, targets=targets)
        arguments = weights, tokens, every(config, tokens)
        ours = compiled(function, arguments, used)(*arguments)
        chosen = only(config, ours)
        with jax.default_matmul_precision("highest"):
            truth = jax.jit(function)(exact, tokens, chosen)
        print(f"{args.model}, {name}: {apart(ours, truth):.1e} from float32", flush=True)
        for kernel in used:
            theirs = compiled(function, arguments, used, without=kernel)(weights, tokens, chosen)
            found = apart(ours, theirs)
            print(
                f"{args.model}, {name}: differs by {found:.1e} without the kernel of {kernel}, "
                f"which then is {apart(theirs, truth):.1e} from float32",
                flush=True,
            )
            assert found <= TOLERANCE, f"{name} differs by more than {TOLERANCE}"


if __name__ == "__main__":
    main()
