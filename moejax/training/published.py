"""The family, and the Hugging Face config, of an architecture that was not read from files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moejax.errors import ConfigError
from moejax.models import FAMILIES, Config


def as_published(config: Config, source: Mapping[str, Any]) -> tuple[Config, dict[str, Any] | None]:
    """The config under a family that has this architecture, and its Hugging Face fields; as it is, if none has.

    Every family that can write a config is asked. What it reads back from the fields that it wrote must be the config:
    nothing is taken on trust, and a family whose parts lack a field that it asks for does not fit.

    Args:
        source: the Hugging Face config of the model that this one was made from, whose token ids are kept.
    """
    kept = {name: source[name] for name in ("bos_token_id", "initializer_range") if name in source}
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type == "moejax"):
        if family.write_config is None:
            continue
        try:
            fields = _common_fields(config) | kept | family.write_config(config)
            read = family.config(fields)
        except (ConfigError, AttributeError):
            continue
        if read.on_mesh(None, config.mesh) == replace(config, model_type=read.model_type):
            return read.on_mesh(None, config.mesh), fields
    return config, None


def _common_fields(config: Config) -> dict[str, Any]:
    """Fields that all families write alike, for a model of grouped-query attention."""
    attention: Any = config.blocks[0].attention
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.rope.theta,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None),
        "pad_token_id": config.pad_id,
    }
