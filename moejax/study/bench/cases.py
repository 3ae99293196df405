"""What is timed: functions of the weights and the tokens, each one compiled program."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.generation import Generation, generate_tokens
from moejax.lm import LM
from moejax.models import Decoder, FlatDecoder, unflatten
from moejax.relevance import Continuation, Relevance, explain
from moejax.relevance.engine import Readout, relevance
from moejax.relevance.seeds import LogitSeeds
from moejax.rules import GIM, AttnLRP, Gates, Plain, Proportional, Reading, Rule

DECODED = 64
"""New tokens of the decoding case."""


@dataclass(frozen=True)
class Case:
    """A function of the weights and the tokens.

    Attributes:
        passes: how often it reads all weights (0: those a token uses, once for each new token).
        targets: of each backward pass.
        long: runs on the long prompt.
        call: what a user calls for it, with a token more than the function takes.
    """

    name: str
    function: Callable[[FlatDecoder, Array], object]
    passes: int
    targets: int = 0
    long: bool = False
    call: Callable[[LM, list[int]], object] | None = None


def forward(weights: Decoder | FlatDecoder, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B 1 V"], list[Array]]:
    """Logits of the last position, and the experts that each layer's slots were routed to."""
    decoder = unflatten(weights)
    hidden = decoder.hidden(tokens)
    ids = [routing.ids for routing in hidden.routing() if routing is not None]
    return decoder.logits(hidden.stream[:, -1:]), ids


def gradient(weights: Decoder | FlatDecoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Gradient times input of the largest logit, per token."""
    decoder = unflatten(weights)
    ones = jnp.ones((decoder.config.num_layers + 1, *tokens.shape))

    def largest(gate: Array) -> Array:
        reading = Reading(Plain(), Gates(tokens=gate))
        return decoder.logits(decoder.hidden(tokens, reading=reading).stream[:, -1:], reading).max()

    return jax.grad(largest)(ones)[0]


def explanation(rule: Rule, targets: int, *, again: float = 0.0) -> Callable[..., Readout]:
    """Relevance at all gates for the ``targets`` last positions; a share of the layers is computed ``again``.

    The function takes interventions as well, if there are any.
    """

    def run(weights: FlatDecoder, tokens: Array, interventions: Gates = Gates()) -> Readout:
        length = tokens.shape[1]
        positions = jnp.arange(length - targets, length, dtype=jnp.int32)[None]
        seeds = LogitSeeds.of(positions, jnp.full((1, targets, 1), -1, jnp.int32), jnp.ones((1, targets, 1)))
        layers = round(again * weights.config.num_layers)
        return relevance(weights, tokens, None, seeds, interventions, rule=rule, rematerialised_layers=layers)

    return run


def calling(rule: Rule, targets: int) -> Callable[[LM, list[int]], Relevance]:
    """The relevance of the last ``targets`` tokens, as ``explain`` gives it."""

    def call(lm: LM, ids: list[int]) -> Relevance:
        return explain(lm, ids[:-targets], target=Continuation(ids[-targets:]), rule=rule)

    return call


def decoding(new: int) -> Callable[[FlatDecoder, Array], Generation]:
    """Greedy continuation by ``new`` tokens, the whole loop on the device."""

    def run(weights: FlatDecoder, tokens: Array) -> Generation:
        valid = jnp.ones(tokens.shape, bool)
        return generate_tokens(weights, tokens, valid, jax.random.key(0), max_new_tokens=new)

    return run


CASES = (
    Case("forward", forward, 1),
    Case("gradient", gradient, 2, 1),
    Case("AttnLRP 1 target", explanation(AttnLRP(), 1), 2, 1, call=calling(AttnLRP(), 1)),
    Case("AttnLRP 16 targets", explanation(AttnLRP(), 16), 2, 16, call=calling(AttnLRP(), 16)),
    Case("Backtrace 1 target", explanation(Proportional(), 1), 2, 1),
    Case("AttnLRP long", explanation(AttnLRP(), 1), 2, 1, long=True),
    Case("AttnLRP long half rematerialised", explanation(AttnLRP(), 1, again=0.5), 2, 1, long=True),
    Case("AttnLRP long rematerialised", explanation(AttnLRP(), 1, again=1.0), 2, 1, long=True),
    Case("decode a token", decoding(1 + DECODED), 0),
    Case("Plain 1 target", explanation(Plain(), 1), 2, 1),
    Case("GIM 1 target", explanation(GIM(), 1), 2, 1),
)
"""In the order in which they run. Relevance is read at tokens, experts, heads and layers, with the ledger. No name has
a comma, which stands between them on a command line."""
