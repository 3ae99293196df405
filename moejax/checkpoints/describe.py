"""Describe a model from its config alone, without its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moejax.checkpoints.folder import ModelFolder, open_folder
from moejax.errors import ConfigError
from moejax.models import FAMILIES, Config, family


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model, under the names that Hugging Face configs have for them.

    ``intermediate_size`` is the width of a routed expert, whatever its family calls it. A model without experts has
    ``num_experts=0``, and ``intermediate_size`` is the width of its dense layers.
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
        """Take the sizes from the config of a decoder."""
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
        """Return a dictionary that can be written as JSON."""
        return asdict(self)


def list_supported_models() -> list[str]:
    """Return the ``model_type`` names of the families that can be loaded."""
    return list(FAMILIES)


def get_model_config(model: Any) -> ModelConfig:
    """Return the sizes of a model.

    Args:
        model: a loaded model, a ``transformers`` model, a folder, a bundled name or a hub id. For a hub id, only
            ``config.json`` is downloaded.

    Raises:
        ConfigError: the model has no config, or its configuration is not supported.
        CheckpointError: there is no such model.
    """
    return ModelConfig.of(architecture(model))


def architecture(model: Any) -> Config:
    """Return the complete config of a model's decoder; arguments and errors are as in :func:`get_model_config`."""
    if isinstance(model, Config):
        return model
    if isinstance(model, str | Path | ModelFolder):
        return _decoder_config(open_folder(model, ["config.json"]).hugging_face)
    decoder = getattr(model, "decoder", model)
    config = getattr(decoder, "config", None)
    if isinstance(config, Config):
        return config
    if config is None or not hasattr(config, "to_dict"):
        raise ConfigError(f"a {type(model).__name__} has no config: give a model, its folder, or its name.")
    return _decoder_config(config.to_dict())


def _decoder_config(fields: Mapping[str, Any]) -> Config:
    """Return the config of the decoder that a Hugging Face config describes."""
    return family(fields.get("model_type")).config(fields)
