"""Logits and generation of every family equal those of transformers; every likely mistake is seen."""

import copy
from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny.compare import relative_rms
from tiny.config_changes import with_rope
from tiny.hugging_face import FAMILIES, every_family, loaded, random_batch, torch_logits, torch_model, with_config

from moejax import load
from moejax.layers import AttentionConfig, BlockConfig, MixtureConfig
from moejax.layers.attention import latent
from moejax.models import Config

GATE = 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str) -> None:
    tokens, valid = random_batch()
    ours = np.asarray(loaded(family)(tokens, valid=valid))
    # norms after a rotation see the positions themselves, which transformers counts over padding unless it is told
    theirs = torch_logits(torch_model(family), tokens, valid, positions=family == "hunyuan_v1_moe")
    assert relative_rms(ours[valid], theirs[valid]) <= GATE


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "qwen3_moe",
            {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [], "attention_bias": True},
        ),
        ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [3], "decoder_sparse_step": 1}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}),
        ("mixtral", {"sliding_window": None, "tie_word_embeddings": True}),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}),
        ("jetmoe", {"num_experts_per_tok": 3}),
        ("llama", {"attention_bias": False, "mlp_bias": False, "head_dim": None, "tie_word_embeddings": True}),
    ],
)
def test_logits_of_variants(family: str, changes: dict) -> None:
    tokens, valid = random_batch()
    model = torch_model(family, 1, **changes)
    ours = np.asarray(load(model)(tokens, valid=valid))
    assert relative_rms(ours[valid], torch_logits(model, tokens, valid)[valid]) <= GATE


@pytest.mark.parametrize("family", every_family())
def test_greedy_generation(family: str) -> None:
    prompts = [random_batch()[0][0, :11].tolist(), random_batch()[0][1, :5].tolist()]
    ours = loaded(family).generate_ids(prompts, max_new_tokens=64)
    for prompt, row in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = torch_model(family).generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        assert row == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", every_family(["afmoe", "deepseek_v3", "gpt_oss", "olmoe"]))
def test_bfloat16_error_is_that_of_bfloat16(family: str) -> None:
    """Our bfloat16 is at most 1.2 times as far from float32 logits as transformers' own, over several models."""
    tokens, valid = random_batch()
    ours, theirs = [], []
    for seed in range(4):
        model = torch_model(family, seed)
        exact = torch_logits(model, tokens, valid)[valid]
        half = copy.deepcopy(model).bfloat16()
        theirs.append(relative_rms(torch_logits(half, tokens, valid)[valid], exact))
        lm = load(half)
        assert lm.decoder.embedding.dtype == jnp.bfloat16
        ours.append(relative_rms(np.asarray(lm(tokens, valid=valid))[valid], exact))
    assert np.mean(ours) <= 1.2 * np.mean(theirs), (ours, theirs)


def blocks(change: Callable[[BlockConfig], BlockConfig]) -> Callable[[Config], Config]:
    return lambda config: replace(config, blocks=tuple(change(block) for block in config.blocks))


def moe(**fields) -> Callable[[Config], Config]:
    def change(block: BlockConfig) -> BlockConfig:
        inner = block.feed_forward
        return replace(block, feed_forward=replace(inner, **fields)) if isinstance(inner, MixtureConfig) else block

    return blocks(change)


def router(**fields) -> Callable[[Config], Config]:
    def change(block: BlockConfig) -> BlockConfig:
        inner = block.feed_forward
        if not isinstance(inner, MixtureConfig):
            return block
        return replace(block, feed_forward=replace(inner, router=replace(inner.router, **fields)))

    return blocks(change)


def glu(**fields) -> Callable[[Config], Config]:
    return lambda config: moe(unit=replace(config.blocks[0].feed_forward.unit, **fields))(config)


def window(extra: int) -> Callable[[Config], Config]:
    def change(block: BlockConfig) -> BlockConfig:
        inner = block.attention
        assert isinstance(inner, AttentionConfig)
        return replace(block, attention=replace(inner, window=inner.window + extra)) if inner.window else block

    return blocks(change)


def yarn(**fields) -> Callable[[Config], Config]:
    return lambda config: with_rope(config, lambda rope: replace(rope, scaling=replace(rope.scaling, **fields)))


def theta(config: Config) -> Config:
    return with_rope(config, lambda rope: replace(rope, theta=10_000.0))


def attention(**fields) -> Callable[[Config], Config]:
    return blocks(lambda block: replace(block, attention=replace(block.attention, **fields)))


def everywhere_rotated(config: Config) -> Config:
    rope = config.blocks[0].attention.rope
    return attention(rope=rope)(config)


def whole_heads(config: Config) -> Config:
    return attention(rotary_dim=None)(config)


def decoder(**fields) -> Callable[[Config], Config]:
    return lambda config: replace(config, **fields)


MISTAKES = {
    ("deepseek_v2", "rotation on halves"): attention(rotates_neighbours=False),
    ("deepseek_v2", "scores without yarn's factor"): attention(scale=None),
    ("deepseek_v2", "routing weights renormalised"): router(weigh="renormalised"),
    ("deepseek_v2", "groups by their two best"): router(group_score="top2"),
    ("deepseek_v2", "routing factor one"): router(scale=1.0),
    ("deepseek_v3", "rotation on halves"): attention(rotates_neighbours=False),
    ("deepseek_v3", "no groups"): router(num_groups=1, num_selected_groups=1),
    ("deepseek_v3", "routing factor one"): router(scale=1.0),
    ("deepseek_v3", "routing weights not renormalised"): router(weigh="raw"),
    ("deepseek_v3", "softmax scores"): router(score="softmax"),
    ("glm4_moe_lite", "neighbours rotate"): attention(rotates_neighbours=True),
    ("glm4_moe", "whole heads rotate"): whole_heads,
    ("minimax_m2", "whole heads rotate"): whole_heads,
    ("phi3", "whole heads rotate"): whole_heads,
    ("ernie4_5_moe", "rotation on halves"): attention(rotates_neighbours=False),
    ("granitemoe", "logits not divided"): decoder(logits_factor=1.0),
    ("granitemoe", "embeddings not multiplied"): decoder(embedding_factor=1.0),
    ("granitemoe", "branches not multiplied"): blocks(lambda block: replace(block, branch_factor=1.0)),
    ("granitemoe", "usual scale of scores"): attention(scale=None),
    ("afmoe", "rotation in full layers"): everywhere_rotated,
    ("afmoe", "embeddings not multiplied"): decoder(embedding_factor=1.0),
    ("afmoe", "routing factor one"): router(scale=1.0),
    ("hunyuan_v1_moe", "norms before rotation"): attention(norms_rotated=False),
    ("mellum", "one rotation for all layers"): everywhere_rotated,
    ("dots1", "windows in no layer"): attention(window=None),
    ("olmoe", "routing weights renormalised"): router(weigh="renormalised"),
    ("olmoe", "another rope base"): theta,
    ("qwen3_moe", "routing weights not renormalised"): router(weigh="raw"),
    ("qwen3_moe", "another rope base"): theta,
    ("qwen2_moe", "routing weights renormalised"): router(weigh="renormalised"),
    ("mixtral", "routing weights not renormalised"): router(weigh="raw"),
    ("mixtral", "window one longer"): window(1),
    ("gpt_oss", "softmax over all experts"): router(score="softmax", weigh="raw"),
    ("gpt_oss", "no limit in the gate"): glu(limit=None),
    ("gpt_oss", "plain SiLU"): glu(alpha=1.0),
    ("gpt_oss", "no +1"): glu(offset=0.0),
    ("gpt_oss", "window one longer"): window(1),
    ("gpt_oss", "yarn bounds truncated"): yarn(truncate=True),
    ("gpt_oss", "no yarn attention factor"): yarn(attention_factor=1.0),
    ("jetmoe", "softmax over all experts"): router(score="softmax", weigh="raw"),
    ("llama", "another rope base"): theta,
    ("jetmoe", "block norms with the config's eps"): blocks(lambda block: replace(block, norm_eps=1e-3)),
}


@pytest.mark.parametrize(("family", "mistake"), MISTAKES, ids=lambda value: value.replace(" ", "-"))
def test_mistakes_are_seen(family: str, mistake: str) -> None:
    """Three of these keep every argmax (limit, truncation, eps): only a norm of the error sees them."""
    tokens, valid = random_batch()
    lm = loaded(family)
    wrong = with_config(lm, MISTAKES[family, mistake](lm.config))
    ours = np.asarray(wrong(tokens, valid=valid))[valid]
    assert relative_rms(ours, torch_logits(torch_model(family), tokens, valid)[valid]) > 10 * GATE


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "afmoe"])
def test_a_bias_of_the_selection_matters(family: str) -> None:
    """Without it other experts are selected, so that the parity of logits is one with the bias."""
    tokens, valid = random_batch()
    lm = loaded(family)
    right = np.asarray(lm(tokens, valid=valid))[valid]
    without = copy.deepcopy(lm.decoder)
    for layer in without.layers:
        if hasattr(layer.feed_forward, "router"):
            layer.feed_forward.router.selection_bias = jnp.zeros_like(layer.feed_forward.router.selection_bias)
    wrong = np.asarray(without(jnp.asarray(tokens), valid=jnp.asarray(valid)))[valid]
    assert relative_rms(wrong, right) > 1e-2


def test_small_latents_show_the_eps_of_their_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """With latents of size one, an eps of 1e-5 in place of 1e-6 would pass for rounding."""
    tokens, valid = random_batch()
    model = copy.deepcopy(torch_model("deepseek_v3"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kv_a_proj" in name or "q_a_proj" in name:
                parameter *= 0.03
    theirs, lm = torch_logits(model, tokens, valid)[valid], load(model)
    assert relative_rms(np.asarray(lm(tokens, valid=valid))[valid], theirs) <= GATE
    monkeypatch.setattr(latent, "LATENT_EPS", 1e-5)
    wrong = with_config(lm, replace(lm.config, pad_id=5))  # another tree, made anew with that eps
    assert relative_rms(np.asarray(wrong(tokens, valid=valid))[valid], theirs) > 10 * GATE


def test_sinks_matter() -> None:
    tokens, valid = random_batch()
    lm = loaded("gpt_oss")
    without = copy.deepcopy(lm.decoder)
    for layer in without.layers:
        layer.attention.sinks = jnp.full_like(layer.attention.sinks, -1e9)
    ours = np.asarray(without(jnp.asarray(tokens), valid=jnp.asarray(valid)))[valid]
    assert relative_rms(ours, np.asarray(lm(tokens, valid=valid))[valid]) > 1e-2
