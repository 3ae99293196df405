"""A bound on memory is kept, by chunks of targets and by computing activations again, and changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Continuation, MoejaxError, explain
from moejax.models import Decoder
from moejax.relevance.budget import Arrangement, Footprint
from moejax.relevance.engine import LogitSeeds, relevance
from moejax.rules import AttnLRP, Gates

from .toy import PROMPT, L, make_config, variant_lm

ANSWER = [3, 1, 4, 1, 5]
FOOTPRINT = Footprint(stored=1000, stream=300, target=50, readout=2)


class TestArrange:
    @pytest.mark.parametrize(
        ("max_bytes", "want"),
        [
            (10_000, Arrangement(16, False)),
            (1032 + 16 * 50, Arrangement(16, False)),
            (1032 + 16 * 50 - 1, Arrangement(15, False)),
            (1032 + 50, Arrangement(1, False)),
            (1032 + 49, Arrangement(14, True)),
            (332 + 50, Arrangement(1, True)),
        ],
    )
    def test_as_many_as_fit(self, max_bytes, want):
        found = FOOTPRINT.arrange(16, max_bytes)
        assert found == want
        assert FOOTPRINT.bytes(16, found) <= max_bytes

    def test_what_is_given_holds(self):
        assert FOOTPRINT.arrange(16, 10_000, rematerialise=True) == Arrangement(16, True)
        with pytest.raises(MoejaxError, match="max_bytes=1081 is too little: one target at a time takes about 1082"):
            FOOTPRINT.arrange(16, 1081, rematerialise=False)

    def test_too_little(self):
        with pytest.raises(
            MoejaxError, match="max_bytes=381 is too little: one target at a time takes about 382 bytes"
        ):
            FOOTPRINT.arrange(16, 381)


@pytest.mark.parametrize(
    ("chunk", "rematerialise"), [(2, False), (3, False), (4, True)], ids=["2", "3", "4, rematerialised"]
)
def test_bounded_equals_unbounded(chunk, rematerialise):
    """Five targets: chunks that do not divide them, and a bound from which the chunk follows."""
    lm, nodes, target = variant_lm("clip-bias"), ["feed_forward.0"], Continuation(ANSWER)
    tokens = len(PROMPT) + len(ANSWER) - 1
    found = Footprint.of(lm.config, 1, tokens, 4)
    readout = found.readout + 4 * tokens * lm.config.model_dim
    bound = (found.stream if rematerialise else found.stored) + chunk * found.target + 5 * readout
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


def temporary(tokens: int, targets: int, **options) -> int:
    """Bytes that the compiled pass takes beside its arguments."""
    config = make_config(layers=L, sizes=(64, 48, 6, 2, 4, 2, 16))
    seeds = LogitSeeds.of(*(jnp.zeros((1, targets, *s), d) for s, d in [((), int), ((1,), int), ((1,), jnp.float32)]))
    shapes = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, tokens), bool)
    program = relevance.lower(Decoder.abstract(config), *shapes, seeds, Gates(), rule=AttnLRP(), **options)
    return program.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_estimates_are_of_the_right_size():
    """Of what the compiler reports on a CPU, which fuses less than a GPU's; and chunks and recomputing do save it."""
    config, tokens = make_config(layers=L, sizes=(64, 48, 6, 2, 4, 2, 16)), 256
    found = Footprint.of(config, 1, tokens, 4)
    one, nine = temporary(tokens, 1), temporary(tokens, 9)
    assert 0.4 < (nine - one) / 8 / found.target < 2.5
    assert temporary(tokens, 9, chunk=3) < one + (nine - one) / 2
    assert temporary(tokens, 1, rematerialise=True) < one
