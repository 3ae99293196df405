"""What a model is, without its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoints.files import read_config
from moejax.checkpoints.load import find
from moejax.errors import ConfigError
from moejax.models import FAMILIES, Config, family


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that describe a model, under the names that Hugging Face configs have for them.

    ``intermediate_size`` is the width of a routed expert, whatever a family calls it; where there are none (then
    ``num_experts`` is zero), that of the dense layers.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int

    @classmethod
    def of(cls, config: Config) -> "ModelConfig":
        """From an architecture."""
        return cls(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.model_dim,
            intermediate_size=config.expert_dim or config.dense_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_selected,
            max_position_embeddings=config.max_positions,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def list_supported_models() -> list[str]:
    """The ``model_type`` names of the families that can be loaded."""
    return list(FAMILIES)


def get_model_config(model: Any) -> ModelConfig:
    """The config of a loaded model, a ``transformers`` model, a folder, a bundled name or a hub id.

    Of the last, only ``config.json`` is downloaded.

    Raises:
        ConfigError: there is none, or it is not supported.
        CheckpointError: there is no such model.
    """
    return ModelConfig.of(architecture(model))


def architecture(model: Any) -> Config:
    """As :func:`get_model_config`, in full."""
    if isinstance(model, Config):
        return model
    if isinstance(model, str | Path):
        return _supported(read_config(find(model, ["config.json"])))
    decoder = getattr(model, "decoder", model)
    config = getattr(decoder, "config", None)
    if isinstance(config, Config):
        return config
    if config is None or not hasattr(config, "to_dict"):
        raise ConfigError(f"a {type(model).__name__} has no config: give a model, its folder, or its name.")
    return _supported(config.to_dict())


def _supported(fields: Mapping[str, Any]) -> Config:
    return family(fields.get("model_type")).config(fields)
