"""A Hugging Face config is read faithfully or refused; nothing in it is passed over in silence."""

from typing import Any

import pytest

from moejax import ConfigError, MoejaxError
from moejax.models import FAMILIES, Config, family

pytestmark = pytest.mark.fast

PUBLISHED = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
"""``config.json`` of allenai/OLMoE-1B-7B-0924."""


def read(hugging_face: dict[str, Any]) -> Config:
    return family(hugging_face["model_type"]).config(hugging_face)


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def test_published_config() -> None:
    config = read(PUBLISHED)
    assert (config.model_dim, config.num_layers, config.num_heads, config.num_experts, config.num_selected) == (
        2048, 16, 16, 64, 8,
    )  # fmt: skip
    assert config.blocks[0].attention.head_dim == 128
    assert config.blocks[0].attention.qk_norm == "full"
    assert config.blocks[0].attention.clip is None
    assert config.blocks[0].feed_forward.router.weigh == "raw"
    assert config.blocks[0].rotary.rope.theta == 10000.0
    assert config.eos_ids == (50279,)


def test_rope_theta_of_transformers_4_and_5_is_the_same() -> None:
    old = PUBLISHED | {"rope_theta": 500000.0, "rope_scaling": None}
    new = without(PUBLISHED, "rope_theta", "rope_scaling")
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert read(old) == read(new)
    assert read(old).blocks[0].rotary.rope.theta == 500000.0


@pytest.mark.parametrize(
    ("change", "expected"), [(None, ()), (7, (7,)), ([7, 0], (7, 0)), (0, (0,))], ids=["none", "one", "list", "zero"]
)
def test_eos(change: Any, expected: tuple[int, ...]) -> None:
    assert read(PUBLISHED | {"eos_token_id": change}).eos_ids == expected


@pytest.mark.parametrize(("published", "expected"), [(1, 1), (None, 0), (-1, 0)])
def test_padding(published: int | None, expected: int) -> None:
    """-1 stands for none in some; no embedding has it."""
    assert read(PUBLISHED | {"pad_token_id": published}).pad_id == expected


def test_heads_default_to_no_grouping() -> None:
    assert read(without(PUBLISHED, "num_key_value_heads")).blocks[0].attention.num_kv_heads == 16


@pytest.mark.parametrize("model_type", ["gpt2", None, "../olmoe"])
def test_unknown_model_type_lists_the_supported(model_type: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        family(model_type)
    assert repr(model_type) in str(error.value)
    assert FAMILIES
    assert all(name in str(error.value) for name in FAMILIES)


def test_missing_field_is_the_class_default() -> None:
    """transformers' OlmoeConfig has 2048, 2048, 16 and 50304."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    changed = PUBLISHED | {"hidden_size": 1024, "intermediate_size": 8, "num_hidden_layers": 3, "vocab_size": 99}
    config = read(without(changed, *names))
    assert (config.model_dim, config.expert_dim, config.num_layers, config.vocab_size) == (2048, 2048, 16, 50304)


def test_missing_field_without_default_is_named() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        read({"model_type": "moejax", "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 5})


@pytest.mark.parametrize("value", [None, False])
def test_unknown_field_that_is_off_is_accepted(value: Any) -> None:
    assert read(PUBLISHED | {"sliding_window": value}) == read(PUBLISHED)


def test_unknown_activation_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(ConfigError, match="softplus"):
        read(PUBLISHED | {"hidden_act": "softplus"})


@pytest.mark.parametrize(
    "change",
    [{"num_experts_per_tok": 65}, {"num_attention_heads": 7}, {"num_key_value_heads": 5}, {"hidden_size": "2048"}],
    ids=["more slots than experts", "width not divisible", "heads not divisible", "not a number"],
)
def test_impossible_sizes_are_refused(change: dict) -> None:
    with pytest.raises(MoejaxError, match=next(iter(change))):
        read(PUBLISHED | change)
