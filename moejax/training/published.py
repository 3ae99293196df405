"""The family, and the Hugging Face config, of an architecture that was not read from files."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from moejax.errors import ConfigError
from moejax.layers import AttentionConfig, MoEConfig, RegisteredConfig
from moejax.models import Config, family


def as_published(config: Config, source: Mapping[str, Any]) -> tuple[Config, dict[str, Any] | None]:
    """The config under the family that has this architecture and its Hugging Face fields; as it is, if none has.

    What a family reads back from the fields must be the config: nothing is taken on trust.
    """
    if not isinstance(config.blocks[0].attention, AttentionConfig):
        return config, None
    common = _common_fields(config) | {k: source[k] for k in ("bos_token_id", "initializer_range") if k in source}
    for own in (_mixtral_fields, _moejax_fields):
        if (differences := own(config)) is None:
            continue
        candidate = common | differences
        try:
            found = family(candidate["model_type"]).config(candidate)
        except ConfigError:
            continue
        if found.on_mesh(None, config.mesh) == replace(config, model_type=found.model_type):
            return found.on_mesh(None, config.mesh), candidate
    return config, None


def _common_fields(config: Config) -> dict[str, Any]:
    attention: Any = config.blocks[0].attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None),
        "pad_token_id": config.pad_id,
    }


def _mixtral_fields(config: Config) -> dict[str, Any] | None:
    moe: Any = config.blocks[0].feed_forward
    if not isinstance(moe, MoEConfig):
        return None
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": moe.unit.activation,
        "intermediate_size": moe.expert_dim,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.num_selected,
        "sliding_window": None,
    }


def _moejax_fields(config: Config) -> dict[str, Any] | None:
    mixtures = {i: b.feed_forward for i, b in enumerate(config.blocks) if isinstance(b.feed_forward, RegisteredConfig)}
    if not mixtures:
        return None
    moe, attention = next(iter(mixtures.values())), config.blocks[0].attention
    assert isinstance(attention, AttentionConfig)
    defaults = type(moe.args)()
    settings = {f.name: getattr(moe.args, f.name) for f in fields(moe.args) if f.name != "key"}
    usual = {"expert_dim": None, "activation": None, "gated": None, "expert_bias": None}
    out: dict[str, Any] = {
        "model_type": "moejax",
        "moe": moe.name,
        "moe_args": {k: v for k, v in settings.items() if k in usual or v != getattr(defaults, k)},
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "hidden_act": settings["activation"],
        "gated": settings["gated"],
        "intermediate_size": settings["expert_dim"],
        "attention_bias": attention.bias,
        "qk_norm": attention.qk_norm,
    }
    if len(mixtures) < config.num_layers:
        out |= {"moe_layers": list(mixtures), "dense_intermediate_size": config.dense_dim}
    return out
