"""Logits equal those of transformers, and would not if any detail of the architecture were mistaken."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.compare import relative_rms
from tiny.config_changes import with_rope

import moejax
from moejax.layers import BlockConfig, RMSNorm
from moejax.models import Config, Decoder
from moejax.ops.rope import Rope

EXACT = 1e-5
CLEARLY_WRONG = 1e-3

OPTIONS = {
    "default": {},
    "clip_qkv": {"clip_qkv": 0.5},
    "norm_topk_prob": {"norm_topk_prob": True},
    "clip_qkv and norm_topk_prob": {"clip_qkv": 0.7, "norm_topk_prob": True},
    "no grouping of heads": {"num_key_value_heads": 8},
    "one kv head": {"num_key_value_heads": 1},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "attention bias": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "norm eps": {"rms_norm_eps": 0.03},
    "every expert": {"num_experts_per_tok": 9},
    "one expert": {"num_experts_per_tok": 1, "norm_topk_prob": True},
}
LEFT_PADDING = np.arange(7) >= np.array([[0], [2], [5]])
RIGHT_PADDING = np.arange(7) < np.array([[7], [4], [1]])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_transformers(
    options: dict, make_olmoe: Callable, torch_logits: Callable, toy_tokens: np.ndarray
) -> None:
    model = make_olmoe(**options)
    got = moejax.load(model).decoder(jnp.asarray(toy_tokens))
    assert got.shape == (3, 7, 53)
    assert got.dtype == jnp.float32
    assert relative_rms(got, torch_logits(model, toy_tokens)) <= EXACT


@pytest.mark.parametrize("valid", [LEFT_PADDING, RIGHT_PADDING], ids=["left", "right"])
@pytest.mark.parametrize("options", [{}, {"clip_qkv": 0.5, "attention_bias": True}], ids=["default", "clip and bias"])
def test_padded_logits_equal_transformers(
    options: dict, valid: np.ndarray, make_olmoe: Callable, torch_logits: Callable, toy_tokens: np.ndarray
) -> None:
    model = make_olmoe(**options)
    got = moejax.load(model).decoder(jnp.asarray(toy_tokens), valid=jnp.asarray(valid))
    assert np.isfinite(got).all(), "padding must not spread NaN"
    assert relative_rms(got, torch_logits(model, toy_tokens, valid), valid) <= EXACT


@pytest.mark.parametrize("container", [np.asarray, jnp.asarray, np.ndarray.tolist], ids=["numpy", "jax", "lists"])
def test_tokens_may_come_in_any_container(
    container: Callable, toy_lm: moejax.LM, toy_torch: Any, torch_logits: Callable, toy_tokens: np.ndarray
) -> None:
    assert relative_rms(toy_lm(container(toy_tokens)), torch_logits(toy_torch, toy_tokens)) <= EXACT
    one_row = toy_lm(container(toy_tokens[0]))
    assert one_row.shape == (1, 7, 53), "a row without a batch axis is a batch of one"


@pytest.mark.parametrize("valid", [LEFT_PADDING, RIGHT_PADDING], ids=["left", "right"])
def test_padding_is_never_seen(valid: np.ndarray, toy_lm: moejax.LM, toy_tokens: np.ndarray) -> None:
    """A padded row gives what its tokens give alone, whatever stands in the padding."""
    decoder, where = toy_lm.decoder, jnp.asarray(valid)
    padded = decoder(jnp.where(where, toy_tokens, 1), valid=where)
    other = decoder(jnp.where(where, toy_tokens, 2), valid=where)
    np.testing.assert_array_equal(np.asarray(padded)[valid], np.asarray(other)[valid])
    row = 1
    alone = decoder(jnp.asarray(toy_tokens[row, valid[row]])[None])[0]
    np.testing.assert_allclose(padded[row, valid[row]], alone, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_close(make_olmoe: Callable, torch_logits: Callable, toy_tokens: np.ndarray) -> None:
    model = make_olmoe(norm_topk_prob=True)
    got = moejax.load(model, dtype=jnp.bfloat16).decoder(jnp.asarray(toy_tokens))
    assert got.dtype == jnp.float32, "logits are float32 whatever the weights"
    assert relative_rms(got, torch_logits(model, toy_tokens)) <= 0.2


class PerHeadNorm(RMSNorm):
    """The mistake of normalising each head by itself, as most other families do."""

    def _normed(self, x: jax.Array, reading: moejax.rules.Reading, dtype: Any) -> jax.Array:
        heads = x.reshape(*x.shape[:-1], -1, 6)
        return super()._normed(heads, reading, dtype).reshape(x.shape)


def with_config(decoder: Decoder, config: Config) -> Decoder:
    """The same weights in another architecture."""
    tree = jax.tree.structure(Decoder.abstract(config))
    return jax.tree.unflatten(tree, jax.tree.leaves(decoder))


def in_blocks(config: Config, change: Callable[[BlockConfig], BlockConfig]) -> Config:
    return dataclasses.replace(config, blocks=tuple(map(change, config.blocks)))


def attention(config: Config, **changes: Any) -> Config:
    replace = dataclasses.replace
    return in_blocks(config, lambda block: replace(block, attention=replace(block.attention, **changes)))


def router(config: Config, **changes: Any) -> Config:
    replace = dataclasses.replace

    def change(block: BlockConfig) -> BlockConfig:
        moe = block.feed_forward
        return replace(block, feed_forward=replace(moe, router=replace(moe.router, **changes)))

    return in_blocks(config, change)


def per_head_norms(decoder: Decoder) -> Decoder:
    changed = jax.tree.map(lambda p: p, decoder)
    for layer in changed.layers:
        for name in ("query_norm", "key_norm"):
            norm = getattr(layer.attention, name)
            setattr(layer.attention, name, PerHeadNorm(norm.weight, norm.eps))
    return changed


def edit_layers(decoder: Decoder, edit: Callable[[Any], None]) -> Decoder:
    changed = jax.tree.map(lambda p: p, decoder)
    for layer in changed.layers:
        edit(layer)
    return changed


def swap_gate_and_up(layer: Any) -> None:
    layer.feed_forward.experts.gate_up = layer.feed_forward.experts.gate_up[:, ::-1]


def interleave_kv_heads(layer: Any) -> None:
    """Makes query head ``h`` read key/value head ``h % G`` instead of ``h // (H // G)``."""
    order = np.arange(8).reshape(2, 4).T.reshape(-1)
    joint, output = layer.attention.query_key_value, layer.attention.output
    norm = layer.attention.query_norm
    rows = (order[:, None] * 6 + np.arange(6)).reshape(-1)
    queries = joint.weight[:, :-2]
    moved = queries.reshape(48, -1)[rows].reshape(queries.shape)
    joint.weight = jnp.concatenate([moved, joint.weight[:, -2:]], axis=1)
    norm.weight, output.weight = norm.weight[rows], output.weight[:, rows]


MISTAKES: dict[str, tuple[dict, Callable[[Decoder], Decoder]]] = {
    "q/k norm per head": ({}, per_head_norms),
    "weights renormalised": ({}, lambda d: with_config(d, router(d.config, weigh="renormalised"))),
    "weights not renormalised": ({"norm_topk_prob": True}, lambda d: with_config(d, router(d.config, weigh="raw"))),
    "softmax of scores": ({}, lambda d: with_config(d, router(d.config, weigh="softmax"))),
    "wrong theta": ({}, lambda d: with_config(d, with_rope(d.config, lambda rope: Rope(500.0)))),
    "clip forgotten": ({"clip_qkv": 0.5}, lambda d: with_config(d, attention(d.config, clip=None))),
    "clip invented": ({}, lambda d: with_config(d, attention(d.config, clip=0.5))),
    "one expert fewer": ({}, lambda d: with_config(d, router(d.config, num_selected=1))),
    "gate and up swapped": ({}, lambda d: edit_layers(d, swap_gate_and_up)),
    "kv heads interleaved": ({}, lambda d: edit_layers(d, interleave_kv_heads)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_would_see_the_mistake(
    name: str, make_olmoe: Callable, torch_logits: Callable, toy_tokens: np.ndarray
) -> None:
    options, mistaken = MISTAKES[name]
    model = make_olmoe(**options)
    want = torch_logits(model, toy_tokens)
    decoder = moejax.load(model).decoder
    assert relative_rms(decoder(jnp.asarray(toy_tokens)), want) <= EXACT
    assert relative_rms(mistaken(decoder)(jnp.asarray(toy_tokens)), want) > CLEARLY_WRONG
