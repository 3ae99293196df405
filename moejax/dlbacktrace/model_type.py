"""The name of a model's family, as the user gives it and as the model has it."""

from typing import Any

from moejax.checkpoints import get_model_config, list_supported_models
from moejax.errors import ConfigError


def check_model_type(model: Any, model_type: str | None) -> None:
    """Refuse a name that is not the model's; ``None`` is not checked.

    Raises:
        ConfigError: an unknown name, or the name of another family.
    """
    if model_type is None:
        return
    if model_type not in list_supported_models():
        raise ConfigError(f"model_type={model_type!r} is unknown; choose from {', '.join(list_supported_models())}.")
    if (family := get_model_config(model).model_type) != model_type:
        raise ConfigError(f"the model is a {family}, not a {model_type}; leave model_type out to have it detected.")
