"""Generation gives the tokens of transformers, from one compiled program that never returns to the host."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from generation.reference import NEW, PAD, PROMPTS, theirs, until
from moejax import Gates, MoejaxError, PromptError
from moejax.generation import Sampling, decode, generate_tokens
from moejax.models import Cache, Decoder
from moejax.models.padding import left_pad
from moejax.rules import Reading


def test_the_model_is_worth_generating_from(greedy: list[list[int]]) -> None:
    """Guards the tests below against a model that repeats one token."""
    assert all(len(row) == NEW and len(set(row)) > 5 for row in greedy)


def test_greedy_tokens_equal_transformers(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    assert toy_lm.generate_ids(PROMPTS[:1], max_new_tokens=NEW) == greedy[:1]


def test_batch_of_unequal_prompts_equals_single_prompts(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    assert toy_lm.generate_ids(PROMPTS, max_new_tokens=NEW) == greedy


@pytest.mark.parametrize("options", [{"norm_topk_prob": True, "clip_qkv": 0.5}], ids=["renormalised and clipped"])
def test_greedy_tokens_of_another_architecture(options: dict, make_olmoe: Callable) -> None:
    model = make_olmoe(**options)
    want = theirs(model, PROMPTS[0], NEW).new
    assert moejax.load(model).generate_ids([PROMPTS[0]], max_new_tokens=NEW) == want


@pytest.fixture(scope="module")
def ends(greedy: list[list[int]]) -> tuple[int, ...]:
    """One stops the second row at once, one the first row later."""
    return greedy[0][9], greedy[1][0]


@pytest.fixture(scope="module")
def ending(toy_lm: moejax.LM, ends: tuple[int, ...]) -> moejax.LM:
    """The same weights, configured to end there."""
    tree = jax.tree.structure(Decoder.abstract(dataclasses.replace(toy_lm.config, eos_ids=ends)))
    return moejax.LM(jax.tree.unflatten(tree, jax.tree.leaves(toy_lm.decoder)))


def test_the_first_of_several_ends_stops_a_row_and_only_that_row(
    ending: moejax.LM, greedy: list[list[int]], ends: tuple[int, ...]
) -> None:
    want = [until(row, *ends) for row in greedy]
    assert len({len(row) for row in want}) == 3, "the rows must stop at different steps"
    assert want[1] == []
    assert ending.generate_ids(PROMPTS, max_new_tokens=NEW) == want


def test_tokens_behind_the_end_are_padding(ending: moejax.LM, greedy: list[list[int]], ends: tuple[int, ...]) -> None:
    generation = ending.generate_tokens(PROMPTS, max_new_tokens=NEW)
    for tokens, length, row in zip(generation.tokens.tolist(), generation.lengths.tolist(), greedy, strict=True):
        assert length == min(len(until(row, *ends)) + 1, NEW)
        assert tokens == row[:length] + [PAD] * (NEW - length)


def test_no_forward_pass_follows_the_last_token(toy_lm: moejax.LM) -> None:
    """All cache positions are written: one for each token of the prompt and each new token but the last."""
    tokens, valid = left_pad(PROMPTS, max(map(len, PROMPTS)), PAD)
    call = decode._Call(toy_lm.flat, tokens, valid, np.arange(len(tokens)), jax.random.key(0), Sampling(), Reading())
    options = decode.StaticOptions(NEW, (), PAD, return_scores=False)
    state = decode._jit_decode(call, decode._jit_prefill(call, options), options, NEW, NEW)
    assert int(state.num_chosen) == NEW
    assert int(state.cache.length) == tokens.shape[1] + NEW - 1 == state.cache.valid.shape[1]


def test_cached_logits_equal_the_full_forward(toy_lm: moejax.LM, toy_tokens: np.ndarray) -> None:
    """Prefill of three tokens, then one at a time, against one pass over all; one row is left-padded."""
    decoder, tokens = toy_lm.decoder, jnp.asarray(toy_tokens)
    valid = jnp.asarray(np.arange(7) >= np.array([[0], [2], [0]]))
    want = toy_lm(tokens, valid=valid)
    cache, got = decoder.empty_cache(3, 9), []

    @jax.jit
    def advance(new: jax.Array, valid: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        hidden = decoder.hidden(new, valid=valid, cache=cache)
        return decoder.logits(hidden.stream), hidden.cache

    for part in [slice(0, 3), *(slice(i, i + 1) for i in range(3, 7))]:
        logits, cache = advance(tokens[:, part], valid[:, part], cache)
        got.append(logits)
    assert int(cache.length) == 7
    difference = np.asarray(jnp.concatenate(got, axis=1) - want)[np.asarray(valid)]
    assert np.abs(difference).max() <= 1e-5 * np.abs(want).max()


def test_cache_is_in_the_dtype_of_the_weights(toy_lm: moejax.LM) -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), toy_lm.decoder)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.empty_cache(2, 3).layers)} == {jnp.dtype(jnp.bfloat16)}


SAMPLED = {"max_new_tokens": 12, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "num_return_sequences": 2}


def test_a_row_draws_the_same_whatever_follows_it(toy_lm: moejax.LM) -> None:
    assert toy_lm.generate_ids(PROMPTS[:1], seed=3, **SAMPLED) == toy_lm.generate_ids(PROMPTS, seed=3, **SAMPLED)[:2]


def test_keys_of_either_kind_draw_the_same(toy_lm: moejax.LM, toy_tokens: np.ndarray) -> None:
    tokens, valid = jnp.asarray(toy_tokens), jnp.ones(toy_tokens.shape, bool)
    draw = partial(generate_tokens, toy_lm.flat, tokens, valid, max_new_tokens=6, sampling=Sampling(temperature=1.0))
    np.testing.assert_array_equal(draw(jax.random.PRNGKey(3)).tokens, draw(jax.random.key(3)).tokens)


def test_seed_determines_the_draws(toy_lm: moejax.LM) -> None:
    first = toy_lm.generate_ids(PROMPTS, seed=3, **SAMPLED)
    assert toy_lm.generate_ids(PROMPTS, seed=3, **SAMPLED) == first
    assert toy_lm.generate_ids(PROMPTS, seed=4, **SAMPLED) != first
    assert len(first) == 6
    assert all(one != other for one, other in zip(first[::2], first[1::2], strict=True)), "answers of one prompt"


def test_gates_apply_to_new_tokens(toy_lm: moejax.LM) -> None:
    """An expert switched off while generating is switched off in the forward pass over the result, too.

    The gates differ by prompt, and every beam of a prompt has the gates of its prompt.
    """
    prompts = [PROMPTS[0], PROMPTS[0]]
    gates = Gates.ones(toy_lm.config, jnp.zeros((2, 1), jnp.int32))
    gates = dataclasses.replace(gates, experts=gates.experts.at[0, 1, :, 3].set(0).at[1, 1, :, 6].set(0))
    generation = toy_lm.generate_tokens(prompts, max_new_tokens=12, gates=gates, num_beams=2, return_scores=True)
    assert generation.tokens[0].tolist() != generation.tokens[1].tolist()
    logits = toy_lm(jnp.concatenate([jnp.array(prompts), generation.tokens], axis=1), gates=gates)
    plain = jax.nn.log_softmax(logits[:, len(PROMPTS[0]) - 1 : -1])
    want = jnp.take_along_axis(plain, generation.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(generation.log_probs, want, rtol=1e-4, atol=1e-5)


def test_gates_of_every_token(toy_lm: moejax.LM) -> None:
    """Gates for prompt and new tokens apply each to its token; gates of another length are refused."""
    prompt, new = PROMPTS[0], 8
    tokens = prompt + [0] * new
    gates = Gates.ones(toy_lm.config, tokens).drop_head(0, 3).drop_token(1, 1).drop_expert(1, 2, len(prompt) + 2)
    generation = toy_lm.generate_tokens([prompt], max_new_tokens=new, gates=gates, return_scores=True)
    logits = toy_lm(prompt + generation.tokens[0].tolist(), gates=gates)
    plain = jax.nn.log_softmax(logits[:, len(prompt) - 1 : -1])
    want = jnp.take_along_axis(plain, generation.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(generation.log_probs, want, rtol=1e-4, atol=1e-5)
    other = toy_lm.generate_tokens([prompt], max_new_tokens=new, return_scores=True)
    assert np.abs(generation.log_probs - other.log_probs).max() > 1e-3
    ones = Gates.ones(toy_lm.config, tokens)
    assert toy_lm.generate_ids([prompt], max_new_tokens=new, gates=ones) == [other.tokens[0].tolist()]
    for length in (len(prompt), len(tokens) + 1):
        with pytest.raises(MoejaxError, match=r"gates on tokens of shape .* do not fit"):
            toy_lm.generate_ids([prompt], max_new_tokens=new, gates=Gates.ones(toy_lm.config, [0] * length))


def test_repr_of_a_generation_gives_shapes(toy_lm: moejax.LM) -> None:
    """A model's numbers are not printed, and the class stays a named tuple and a pytree."""
    generation = toy_lm.generate_tokens(PROMPTS, max_new_tokens=4)
    assert repr(generation) == "Generation(tokens=int32[3,4], lengths=int32[3])"
    scored = generation._replace(scores=jnp.zeros((3, 4, 53)))
    assert repr(scored) == "Generation(tokens=int32[3,4], lengths=int32[3], scores=float32[3,4,53])"
    tokens, lengths, *scores, finite = generation
    assert (tokens.shape, lengths.shape, scores) == ((3, 4), (3,), [None, None, None])
    assert finite.shape == (3,)
    shapes = jax.tree.map(jnp.shape, generation)
    assert repr(shapes) == "Generation(tokens=(3, 4), lengths=(3,))"


def test_prompts_as_an_array(toy_lm: moejax.LM) -> None:
    rows = [PROMPTS[0], PROMPTS[0][::-1]]
    want = toy_lm.generate_ids(rows, max_new_tokens=3)
    for prompts in (np.array(rows), jnp.array(rows), [np.array(row) for row in rows]):
        assert toy_lm.generate_ids(prompts, max_new_tokens=3) == want


def test_one_text_is_no_list_of_prompts(toy_lm: moejax.LM) -> None:
    with pytest.raises(PromptError, match="no list of prompts"):
        toy_lm.generate_ids("text")


@pytest.mark.parametrize("prompt", [[], [53], [-1]], ids=str)
def test_bad_prompt(prompt: Sequence, toy_lm: moejax.LM) -> None:
    with pytest.raises(PromptError):
        toy_lm.generate_ids([prompt])


@pytest.mark.parametrize("tokens", [[1.5], [True], ["a"], [[1], [2, 3]]], ids=str)
def test_what_is_no_token_ids(tokens: list, toy_lm: moejax.LM) -> None:
    with pytest.raises(PromptError):
        toy_lm.check(tokens)


def test_one_empty_prompt_of_several(toy_lm: moejax.LM) -> None:
    with pytest.raises(PromptError):
        toy_lm.generate_ids([[5, 3], []])


def test_no_prompts_give_no_answers(toy_lm: moejax.LM) -> None:
    assert toy_lm.generate_ids([]) == []


def jaxprs_within(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.Jaxpr]:
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from jaxprs_within(inner)


@pytest.mark.parametrize("count", [2, 50])
def test_decoding_is_one_loop_on_the_device(count: int, toy_lm: moejax.LM) -> None:
    """One jitted call that holds one loop over tokens, whatever their number, and nothing that calls the host."""
    tokens = jnp.array([PROMPTS[0]])
    arguments = (toy_lm.decoder, tokens, jnp.ones_like(tokens, bool), jax.random.key(0))
    options = {"max_new_tokens": count, "sampling": Sampling(1.0, 5, 0.9), "eos_ids": (0,)}
    outer = jax.make_jaxpr(lambda *a: generate_tokens(*a, **options))(*arguments).jaxpr
    assert len(outer.eqns) == 1, "all of it is one call"
    program = outer.eqns[0].params["jaxpr"].jaxpr
    loops = [e for e in program.eqns if e.primitive.name == "while"]
    assert [v.aval.shape for v in loops[0].outvars].count((1, count)) == 1, "the loop carries the tokens"
    assert len(loops) == 1
    names = {e.primitive.name for jaxpr in jaxprs_within(program) for e in jaxpr.eqns}
    assert {"dot_general", "while"} <= names, "the walk sees the whole program"
    assert not [name for name in names if "callback" in name or "infeed" in name or "outfeed" in name]
