"""Generation: the tokens of transformers, from one compiled program that never visits the host."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax import Gates, MoejaxError, PromptError
from moejax.generation import Sampling, generate_tokens
from moejax.models import Decoder

PROMPTS = [[5, 31, 8, 44, 17, 9, 23], [12], [40, 7, 7, 51]]
NEW = 64


def transformers_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
    return out[0, len(prompt) :].tolist()


def with_ends(lm: moejax.LM, *eos_ids: int) -> moejax.LM:
    """The same weights with other end-of-text tokens."""
    tree = jax.tree.structure(Decoder.abstract(dataclasses.replace(lm.config, eos_ids=eos_ids)))
    return moejax.LM(jax.tree.unflatten(tree, jax.tree.leaves(lm.decoder)))


@pytest.fixture(scope="module")
def greedy(toy_torch: Any) -> list[list[int]]:
    """What transformers continues each prompt with."""
    return [transformers_greedy(toy_torch, prompt, NEW) for prompt in PROMPTS]


def test_the_model_is_worth_generating_from(greedy: list[list[int]]) -> None:
    """Guards the tests below against a model that repeats one token."""
    assert all(len(row) == NEW and len(set(row)) > 5 for row in greedy)


@pytest.mark.parametrize("row", range(3))
def test_greedy_tokens_equal_transformers(row: int, toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    assert toy_lm.generate_ids([PROMPTS[row]], max_new_tokens=NEW) == [greedy[row]]


def test_batch_of_unequal_prompts_equals_single_prompts(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    assert toy_lm.generate_ids(PROMPTS, max_new_tokens=NEW) == greedy


@pytest.mark.parametrize("options", [{"norm_topk_prob": True, "clip_qkv": 0.5}], ids=["renormalised and clipped"])
def test_greedy_tokens_of_another_architecture(options: dict, make_olmoe: Callable) -> None:
    model = make_olmoe(**options)
    want = transformers_greedy(model, PROMPTS[0], NEW)
    assert moejax.load(model).generate_ids([PROMPTS[0]], max_new_tokens=NEW) == [want]


def until(row: list[int], *ends: int) -> list[int]:
    """The tokens before the first of ``ends``."""
    return row[: min((row.index(e) for e in ends if e in row), default=len(row))]


def test_end_of_text_stops_a_row_and_only_that_row(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    end = greedy[0][9]
    want = [until(row, end) for row in greedy]
    assert len({len(row) for row in want}) > 1, "the rows must stop at different steps"
    assert with_ends(toy_lm, end).generate_ids(PROMPTS, max_new_tokens=NEW) == want


def test_several_ends(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    ends = greedy[0][20], greedy[0][12]
    got = with_ends(toy_lm, *ends).generate_ids([PROMPTS[0]], max_new_tokens=NEW)
    assert got == [until(greedy[0], *ends)]


def test_immediate_end_gives_nothing(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    assert with_ends(toy_lm, greedy[1][0]).generate_ids([PROMPTS[1]], max_new_tokens=NEW) == [[]]


def test_tokens_behind_the_end_are_padding(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    end = greedy[1][3]
    stop = greedy[1].index(end)
    tokens = jnp.array([PROMPTS[1]])
    out = generate_tokens(
        toy_lm.decoder,
        tokens,
        jnp.ones_like(tokens, bool),
        jax.random.key(0),
        max_new_tokens=16,
        eos_ids=(end,),
        pad_id=1,
    )
    assert out[0, : stop + 1].tolist() == greedy[1][: stop + 1]
    assert set(out[0, stop + 1 :].tolist()) == {1}


def test_cached_logits_equal_the_full_forward(toy_lm: moejax.LM, toy_tokens: np.ndarray) -> None:
    """Prefill of three tokens, then one at a time, against one pass over all; one row is left-padded."""
    decoder, tokens = toy_lm.decoder, jnp.asarray(toy_tokens)
    valid = jnp.asarray(np.arange(7) >= np.array([[0], [2], [0]]))
    want = decoder(tokens, valid=valid)
    cache, got = decoder.empty_cache(3, 9), []
    for part in [slice(0, 3), *(slice(i, i + 1) for i in range(3, 7))]:
        hidden = decoder.hidden(tokens[:, part], valid=valid[:, part], cache=cache)
        cache = hidden.cache
        got.append(decoder.logits(hidden.stream))
    assert int(cache.length) == 7
    difference = np.asarray(jnp.concatenate(got, axis=1) - want)[np.asarray(valid)]
    assert np.abs(difference).max() <= 1e-5 * np.abs(want).max()


def test_cache_is_in_the_dtype_of_the_weights(toy_lm: moejax.LM) -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), toy_lm.decoder)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.empty_cache(2, 3).layers)} == {jnp.dtype(jnp.bfloat16)}


SAMPLED = {"max_new_tokens": 12, "temperature": 1.3, "top_k": 20, "top_p": 0.95}


def test_seed_determines_the_draw(toy_lm: moejax.LM) -> None:
    first = toy_lm.generate_ids(PROMPTS, seed=3, **SAMPLED)
    assert toy_lm.generate_ids(PROMPTS, seed=3, **SAMPLED) == first
    assert toy_lm.generate_ids(PROMPTS, seed=4, **SAMPLED) != first


def test_top_k_of_one_is_greedy(toy_lm: moejax.LM, greedy: list[list[int]]) -> None:
    got = toy_lm.generate_ids(PROMPTS, max_new_tokens=12, temperature=1.0, top_k=1, seed=5)
    assert got == [row[:12] for row in greedy]


def test_gates_apply_to_new_tokens(toy_lm: moejax.LM) -> None:
    """An expert switched off while generating is switched off in the forward pass over the result, too."""
    gates = Gates.ones(toy_lm.config, jnp.zeros((1, 1), jnp.int32)).drop_expert(layer=0, expert=3)
    gates = gates.drop_expert(layer=1, expert=6)
    new = toy_lm.generate_ids([PROMPTS[0]], max_new_tokens=12, gates=gates)[0]
    assert new != toy_lm.generate_ids([PROMPTS[0]], max_new_tokens=12)[0]
    logits = toy_lm(jnp.array(PROMPTS[0] + new), gates=gates)
    assert jnp.argmax(logits[0, len(PROMPTS[0]) - 1 : -1], axis=-1).tolist() == new


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


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}], ids=str
)
def test_bad_options(options: dict, toy_lm: moejax.LM) -> None:
    with pytest.raises(MoejaxError, match=next(iter(options))):
        toy_lm.generate_ids([PROMPTS[0]], **options)


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
