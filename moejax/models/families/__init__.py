"""Model families, found by file name: ``<model_type>.py`` holds ``config(fields)`` and ``KEYS``."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moejax.errors import ConfigError
from moejax.models.config import Config
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable

FAMILIES: tuple[str, ...] = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))
"""Supported ``model_type`` names."""


@dataclass(frozen=True)
class Family:
    """One family's mapping of configurations and of checkpoint keys."""

    model_type: str
    read_config: Callable[[Fields], Config]
    keys: KeyTable

    def config(self, hugging_face: Mapping[str, Any]) -> Config:
        """The configuration for a Hugging Face config.

        Raises:
            ConfigError: a field is missing, unsupported or unknown.
        """
        fields = Fields(hugging_face)
        config = self.read_config(fields)
        fields.finish()
        return config


def family(model_type: str | None) -> Family:
    """The family of a ``model_type``.

    Raises:
        ConfigError: it is not supported.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported are: {', '.join(FAMILIES)}.")
    module = importlib.import_module(f"{__name__}.{model_type}")
    return Family(model_type, module.config, module.KEYS)
