"""A bound on memory is kept, by chunks of targets and by computing activations again, and changes no number."""

from dataclasses import replace
from importlib import import_module
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, L, make_config, variant_lm

from moejax import Continuation, MoejaxError, explain
from moejax.models import Decoder, family
from moejax.models.padding import bucket_length
from moejax.relevance.budget import Arrangement, Footprint
from moejax.relevance.engine import relevance
from moejax.relevance.seeds import LogitSeeds
from moejax.rules import AttnLRP, Gates, Reading

ANSWER = [3, 1, 4, 1, 5]
FOOTPRINT = Footprint(layers=4, layer=250, stream=20, target=50, readout=2)


@pytest.mark.fast
class TestArrange:
    @pytest.mark.parametrize(
        ("max_bytes", "want"),
        [
            (10_000, Arrangement(16, 0)),
            (1032 + 16 * 50, Arrangement(16, 0)),
            # a layer computed again saves 230: 5 layers run in place of 8
            (1032 + 16 * 50 - 1, Arrangement(16, 1)),
            # 2 x 6 layers in place of 16 x 4 with none again, of 4 x 5 and 2 x 7 with one and three
            (1032 + 50, Arrangement(10, 2)),
            # the last one saves nothing: it is the one that runs again
            (1032 - 3 * 230 + 50, Arrangement(1, 3)),
        ],
    )
    def test_as_many_as_fit(self, max_bytes, want):
        found = FOOTPRINT.arrange(16, max_bytes)
        assert found == want
        assert FOOTPRINT.bytes(16, found) <= max_bytes

    def test_what_is_given_holds(self):
        assert FOOTPRINT.arrange(16, 10_000, rematerialised_layers=3) == Arrangement(16, 3)
        # three layers again would let all go at a time
        assert FOOTPRINT.arrange(16, 1032 + 2 * 50, chunk=2) == Arrangement(2, 0)
        assert FOOTPRINT.arrange(16, 1032 + 2 * 50, chunk=3) == Arrangement(3, 1)
        with pytest.raises(MoejaxError, match="max_bytes=391 is too little: with chunk=2 a pass takes about 442"):
            FOOTPRINT.arrange(16, 391, chunk=2)
        with pytest.raises(MoejaxError, match="max_bytes=1081 is too little: with chunk=1 a pass takes about 1082"):
            FOOTPRINT.arrange(16, 1081, rematerialised_layers=0)

    def test_matrices_that_are_unpacked_count(self):
        packed = replace(FOOTPRINT, unpacked=100)
        assert packed.arrange(16, 1132 + 16 * 50) == Arrangement(16, 0)
        assert packed.arrange(16, 1132 + 16 * 50 - 1) == Arrangement(16, 1)

    def test_too_little(self):
        with pytest.raises(MoejaxError, match="max_bytes=391 is too little: with chunk=1 a pass takes about 392 bytes"):
            FOOTPRINT.arrange(16, 391)


def test_what_every_token_takes_counts():
    """A shared expert and a dense layer, as wide as they are."""
    moejax = {"model_type": "moejax", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 10, "num_experts": 4}
    moejax |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    plain, *shared = (
        family("moejax").config(moejax | {"moe": moe, "moe_args": args})
        for moe, args in (("smoe", {}), ("smoe_share", {"num_shared": 1}), ("smoe_share", {"num_shared": 4}))
    )
    assert [c.feed_forward.shared_dim for c in (plain, *shared)] == [0, 10, 40]
    found = [Footprint.of(c, 1, 100, 4) for c in (plain, *shared)]
    assert found[0].layer < found[1].layer < found[2].layer
    assert found[0].target < found[1].target < found[2].target
    llama = {k: v for k, v in moejax.items() if "expert" not in k} | {"model_type": "llama", "rms_norm_eps": 1e-5}
    narrow, wide = (
        Footprint.of(family("llama").config(llama | {"intermediate_size": w}), 1, 100, 4) for w in (10, 1000)
    )
    assert wide.layer - narrow.layer == 4 * 990 * 100 * 4
    assert wide.target > narrow.target


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


class TestWhatExplainAsksFor:
    @pytest.fixture
    def asked(self, monkeypatch):
        """The number of layers that run again, of each pass."""
        found, module = [], import_module("moejax.relevance.explain")
        spy = lambda *args, **options: found.append(options["rematerialised_layers"]) or relevance(*args, **options)
        monkeypatch.setattr(module, "relevance", spy)
        return found

    @pytest.mark.parametrize(("rematerialise", "layers"), [(None, 0), (False, 0), (True, 2), (1, 1), (2, 2), (9, 2)])
    def test_layers(self, asked, rematerialise, layers):
        lm = variant_lm("plain")
        assert lm.config.num_layers == 2
        explain(lm, PROMPT, rematerialise=rematerialise)
        assert asked == [layers]

    def test_as_the_bound_asks(self, asked):
        lm = variant_lm("plain")
        found = Footprint.of(lm.config, 1, len(PROMPT), 4)
        explain(lm, PROMPT, max_bytes=found.kept(0) + found.target + found.readout)
        explain(lm, PROMPT, max_bytes=found.kept(0) + found.target + found.readout - 1)
        assert asked == [0, 1]

    def test_as_what_is_free_asks(self, asked, monkeypatch):
        """By default, where the device tells; a prompt is padded all the same, so that its program is found."""
        lm = variant_lm("plain")
        padded = Footprint.of(lm.config, 1, bucket_length(len(PROMPT)), 4)
        bound = padded.kept(0) + padded.target + padded.readout
        for free in (bound, bound - 1, None):
            monkeypatch.setattr(import_module("moejax.relevance.explain"), "free_bytes", lambda _, free=free: free)
            explain(lm, PROMPT)
        assert asked == [0, 1, 0]

    def test_a_pass_that_seems_not_to_fit_is_tried(self, asked, monkeypatch):
        monkeypatch.setattr(import_module("moejax.relevance.explain"), "free_bytes", lambda _: 1000)
        with pytest.warns(UserWarning, match="GiB are needed beside the weights and 0.00 GiB are free"):
            explain(variant_lm("plain"), PROMPT)
        assert asked == [1]
        explain(variant_lm("plain"), PROMPT, max_bytes=None)
        assert asked == [1, 0]

    def test_a_word_that_is_no_bound(self):
        with pytest.raises(MoejaxError, match="max_bytes='most': a number of bytes, 'auto', or None"):
            explain(variant_lm("plain"), PROMPT, max_bytes="most")

    def test_less_than_none(self):
        with pytest.raises(MoejaxError, match="rematerialise=-1: a number of layers"):
            explain(variant_lm("plain"), PROMPT, rematerialise=-1)


def test_the_first_layers_run_again():
    """Once the way back reaches them, what the others keep is not needed any more."""
    lm = variant_lm("plain", layers=3)
    run = lambda x: lm.decoder.hidden(jnp.asarray([PROMPT]), rematerialised_layers=1, embedded=x).stream
    equations = jax.make_jaxpr(run)(jnp.ones((1, len(PROMPT), lm.config.model_dim))).eqns
    # a checkpoint has a policy, a layer that is not in one is a call by name
    layers = ["policy" in e.params for e in equations if "policy" in e.params or e.params.get("name") == "__call__"]
    assert layers == [True, False, False]


def test_a_bound_too_small_says_what_is_needed():
    with pytest.raises(MoejaxError, match="max_bytes=1000 is too little"):
        explain(variant_lm("plain"), PROMPT, max_bytes=1000)


def kept(again: int, layers: int, tokens: int) -> int:
    """Bytes that a forward pass hands to the backward pass, weights included."""
    config, ids = make_config(layers=layers, sizes=(64, 48, 6, 2, 4, 2, 16)), jnp.zeros((1, tokens), int)

    def saved(decoder, gates):
        run = lambda g: decoder.hidden(ids, reading=Reading(AttnLRP(), g), rematerialised_layers=again).stream
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
