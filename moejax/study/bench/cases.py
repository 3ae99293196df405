"""The timed cases: functions of the weights and the tokens. Each is compiled as one program."""

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

NEW_TOKENS = 64
"""Number of new tokens of the decoding case."""


@dataclass(frozen=True)
class Case:
    """A function to time.

    Attributes:
        name: its name on the command line and in tables.
        function: takes the weights and the tokens ``[1, T]``.
        passes: how often it reads all weights; 0 for decoding, which reads the active weights once for each new token.
        targets: number of targets of each backward pass.
        long: True if it runs on the long prompt.
        call: the public function that a user would call, with ``T + 1`` token ids; timed as well if there is one.
    """

    name: str
    function: Callable[[FlatDecoder, Array], object]
    passes: int
    targets: int = 0
    long: bool = False
    call: Callable[[LM, list[int]], object] | None = None


def forward(weights: Decoder | FlatDecoder, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B 1 V"], list[Array]]:
    """Logits of the last position, and the expert ids ``[B, T, K]`` of each layer with experts."""
    decoder = unflatten(weights)
    hidden = decoder.hidden(tokens)
    ids = [routing.ids for routing in hidden.routing() if routing is not None]
    return decoder.logits(hidden.stream[:, -1:]), ids


def gradient(weights: Decoder | FlatDecoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Gradient times input of the largest logit, for each token."""
    decoder = unflatten(weights)
    ones = jnp.ones((decoder.config.num_layers + 1, *tokens.shape))

    def largest(gate: Array) -> Array:
        reading = Reading(Plain(), Gates(tokens=gate))
        return decoder.logits(decoder.hidden(tokens, reading=reading).stream[:, -1:], reading).max()

    return jax.grad(largest)(ones)[0]


def relevance_function(rule: Rule, targets: int, *, rematerialised: float = 0.0) -> Callable[..., Readout]:
    """A function that computes relevance at all gates, with the ``targets`` last positions as targets.

    Args:
        rule: the relevance rule.
        targets: number of targets N.
        rematerialised: fraction of the layers whose activations are recomputed in the backward pass.

    Returns:
        A function of the weights, the tokens ``[1, T]`` and, optionally, interventions.
    """

    def run(weights: FlatDecoder, tokens: Array, interventions: Gates = Gates()) -> Readout:
        length = tokens.shape[1]
        positions = jnp.arange(length - targets, length, dtype=jnp.int32)[None]
        seeds = LogitSeeds.of(positions, jnp.full((1, targets, 1), -1, jnp.int32), jnp.ones((1, targets, 1)))
        layers = round(rematerialised * weights.config.num_layers)
        return relevance(weights, tokens, None, seeds, interventions, rule=rule, rematerialised_layers=layers)

    return run


def explain_call(rule: Rule, targets: int) -> Callable[[LM, list[int]], Relevance]:
    """A function that calls ``explain`` with the last ``targets`` tokens as targets."""

    def call(lm: LM, ids: list[int]) -> Relevance:
        return explain(lm, ids[:-targets], target=Continuation(ids[-targets:]), rule=rule)

    return call


def decode_function(new_tokens: int) -> Callable[[FlatDecoder, Array], Generation]:
    """A function that continues a prompt greedily by ``new_tokens`` tokens; the loop runs on the device."""

    def run(weights: FlatDecoder, tokens: Array) -> Generation:
        valid = jnp.ones(tokens.shape, bool)
        return generate_tokens(weights, tokens, valid, jax.random.key(0), max_new_tokens=new_tokens)

    return run


CASES = (
    Case("forward", forward, 1),
    Case("gradient", gradient, 2, 1),
    Case("AttnLRP 1 target", relevance_function(AttnLRP(), 1), 2, 1, call=explain_call(AttnLRP(), 1)),
    Case("AttnLRP 16 targets", relevance_function(AttnLRP(), 16), 2, 16, call=explain_call(AttnLRP(), 16)),
    Case("Backtrace 1 target", relevance_function(Proportional(), 1), 2, 1),
    Case("AttnLRP long", relevance_function(AttnLRP(), 1), 2, 1, long=True),
    Case("AttnLRP long half rematerialised", relevance_function(AttnLRP(), 1, rematerialised=0.5), 2, 1, long=True),
    Case("AttnLRP long rematerialised", relevance_function(AttnLRP(), 1, rematerialised=1.0), 2, 1, long=True),
    Case("decode a token", decode_function(1 + NEW_TOKENS), 0),
    Case("Plain 1 target", relevance_function(Plain(), 1), 2, 1),
    Case("GIM 1 target", relevance_function(GIM(), 1), 2, 1),
)
"""All cases in the order in which they run. Relevance cases read tokens, experts, heads, layers and the ledger. Names
have no comma, because commas separate them on the command line."""
