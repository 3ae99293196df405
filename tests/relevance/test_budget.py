"""A bound on memory is kept, by chunks of targets and by computing activations again, and changes no number."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Continuation, MoejaxError, explain
from moejax.models import Decoder
from moejax.relevance.budget import Arrangement, Footprint
from moejax.relevance.engine import LogitSeeds, relevance
from moejax.rules import AttnLRP, Gates, Reading

from .toy import PROMPT, L, make_config, variant_lm

ANSWER = [3, 1, 4, 1, 5]
FOOTPRINT = Footprint(layers=4, layer=250, stream=20, target=50, readout=2)


class TestArrange:
    @pytest.mark.parametrize(
        ("max_bytes", "want"),
        [
            (10_000, Arrangement(16, 0)),
            (1032 + 16 * 50, Arrangement(16, 0)),
            (1032 + 16 * 50 - 1, Arrangement(15, 0)),
            (1032 + 50, Arrangement(1, 0)),
            # a layer computed again saves 230
            (1032 + 49, Arrangement(5, 1)),
            (1032 - 230 + 49, Arrangement(5, 2)),
            # the last one saves nothing: it is the one that runs again
            (1032 - 3 * 230 + 50, Arrangement(1, 3)),
        ],
    )
    def test_as_many_as_fit(self, max_bytes, want):
        found = FOOTPRINT.arrange(16, max_bytes)
        assert found == want
        assert FOOTPRINT.bytes(16, found) <= max_bytes

    def test_what_is_given_holds(self):
        assert FOOTPRINT.arrange(16, 10_000, rematerialise=3) == Arrangement(16, 3)
        with pytest.raises(MoejaxError, match="max_bytes=1081 is too little: one target at a time takes about 1082"):
            FOOTPRINT.arrange(16, 1081, rematerialise=0)

    def test_too_little(self):
        with pytest.raises(
            MoejaxError, match="max_bytes=391 is too little: one target at a time takes about 392 bytes"
        ):
            FOOTPRINT.arrange(16, 391)


@pytest.mark.parametrize(
    ("chunk", "rematerialise"),
    [(2, 0), (3, 0), (2, 1), (4, True)],
    ids=["2", "3", "2, one layer again", "4, all again"],
)
def test_bounded_equals_unbounded(chunk, rematerialise):
    """Five targets: chunks that do not divide them, and a bound from which the chunk follows."""
    lm, nodes, target = variant_lm("clip-bias"), ["feed_forward.0"], Continuation(ANSWER)
    tokens = len(PROMPT) + len(ANSWER) - 1
    found = Footprint.of(lm.config, 1, tokens, 4)
    readout = found.readout + 4 * tokens * lm.config.model_dim
    again = found.layers if rematerialise is True else rematerialise
    bound = found.kept(again) + chunk * found.target + 5 * readout
    whole = explain(lm, PROMPT, target=target, nodes=nodes)
    parts = explain(lm, PROMPT, target=target, nodes=nodes, max_bytes=bound, rematerialise=rematerialise)
    same = {"rtol": 1e-5, "atol": 1e-5}
    for name in ("layers", "experts", "heads"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), **same, err_msg=name)
    np.testing.assert_allclose(parts.vectors["feed_forward.0"], whole.vectors["feed_forward.0"], **same)
    np.testing.assert_allclose(parts.ledger.residual, 0, atol=1e-5)
    assert parts.layers.shape[0] == 5


def test_a_bound_too_small_says_what_is_needed():
    with pytest.raises(MoejaxError, match="max_bytes=1000 is too little"):
        explain(variant_lm("plain"), PROMPT, max_bytes=1000)


def kept(rematerialise: int, layers: int, tokens: int) -> int:
    """Bytes that a forward pass hands to the backward pass, weights included."""
    config, ids = make_config(layers=layers, sizes=(64, 48, 6, 2, 4, 2, 16)), jnp.zeros((1, tokens), int)

    def saved(decoder, gates):
        run = lambda g: decoder.hidden(ids, reading=Reading(AttnLRP(), g), rematerialise=rematerialise).stream  # noqa: E731
        return jax.vjp(run, gates)[1]

    shapes = jax.eval_shape(saved, Decoder.abstract(config), Gates.readout(config, ids))
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(shapes))


def test_each_layer_that_runs_again_saves_memory():
    found = Footprint.of(make_config(layers=4, sizes=(64, 48, 6, 2, 4, 2, 16)), 1, 256, 4)
    sizes = [kept(again, 4, 256) for again in range(5)]
    for more, less in pairwise(sizes):
        assert 0.5 < (more - less) / (found.layer - found.stream) < 2


def temporary(tokens: int, targets: int, **options) -> int:
    """Bytes that the compiled pass takes beside its arguments."""
    config = make_config(layers=L, sizes=(64, 48, 6, 2, 4, 2, 16))
    seeds = LogitSeeds.of(*(jnp.zeros((1, targets, *s), d) for s, d in [((), int), ((1,), int), ((1,), jnp.float32)]))
    shapes = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, tokens), bool)
    program = relevance.lower(Decoder.abstract(config), *shapes, seeds, Gates(), rule=AttnLRP(), **options)
    return program.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_estimates_are_of_the_right_size():
    """Of what the compiler reports on a CPU, which fuses less than a GPU's; and chunks do save it."""
    config, tokens = make_config(layers=L, sizes=(64, 48, 6, 2, 4, 2, 16)), 256
    found = Footprint.of(config, 1, tokens, 4)
    one, nine = temporary(tokens, 1), temporary(tokens, 9)
    assert 0.4 < (nine - one) / 8 / found.target < 2.5
    assert temporary(tokens, 9, chunk=3) < one + (nine - one) / 2
