"""Model families: how a Hugging Face config becomes ours, and which published tensors hold which leaf."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from moejax.errors import ConfigError
from moejax.models.config import Config
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable
from moejax.registry import Registry

ReadConfig = Callable[[Fields], Config]
WriteConfig = Callable[[Config], dict[str, Any]]
Read = TypeVar("Read", bound=ReadConfig)


@dataclass(frozen=True)
class Family:
    """One family's mapping of configurations and of checkpoint keys.

    Attributes:
        model_type: name of the family, as in Hugging Face configs.
        read_config: from the fields of a Hugging Face config to a :class:`Config`.
        keys: the layouts in which each leaf is published.
        write_config: from a :class:`Config` to the fields in which this family differs from others; only for families
            that a model of ours may be published as (:func:`moejax.training.upcycle`).
        left_out: patterns of the keys of tensors that published checkpoints hold beside the decoder, such as layers
            that predict further tokens; ``{num_layers}`` stands for the number of layers.
    """

    model_type: str
    read_config: ReadConfig
    keys: KeyTable
    write_config: WriteConfig | None = None
    left_out: tuple[str, ...] = ()

    def leaves_out(self, key: str, num_layers: int) -> bool:
        """Return whether a tensor of that key is none of the decoder's, although checkpoints hold it."""
        return any(fnmatchcase(key, pattern.format(num_layers=num_layers)) for pattern in self.left_out)

    def config(self, hugging_face: Mapping[str, Any]) -> Config:
        """The configuration for a Hugging Face config.

        Raises:
            ConfigError: a field is missing, of another kind, unsupported or unknown.
        """
        fields = Fields(hugging_face)
        config = self.read_config(fields)
        fields.finish()
        for rotary in dict.fromkeys(block.rotary for block in config.blocks):
            if rotary is not None:
                rotary.check()
        return config

    @property
    def has_packed_experts(self) -> bool:
        """True if the family publishes experts as MXFP4."""
        return any(path.endswith(".blocks") for path in self.keys)


FAMILIES: Registry[Family] = Registry("model_type", "moejax.models.families", ConfigError)
"""Families by ``model_type``."""


def register_family(
    model_type: str, keys: KeyTable, *, write_config: WriteConfig | None = None, left_out: tuple[str, ...] = ()
) -> Callable[[Read], Read]:
    """Decorator for a function from :class:`Fields` to :class:`Config`: register a family.

    Args:
        model_type: the name in Hugging Face configs.
        keys: the layouts in which each leaf is published.
        write_config: the inverse of the function, as :attr:`Family.write_config`.
        left_out: patterns of keys that are no part of the decoder, as :attr:`Family.left_out`.

    Raises:
        ConfigError: another family has the name.
    """

    def register(read_config: Read) -> Read:
        FAMILIES.add(model_type, Family(model_type, read_config, keys, write_config, left_out), read_config)
        return read_config

    return register


def family(model_type: Any) -> Family:
    """The family of a ``model_type``.

    Raises:
        ConfigError: it is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r:.80} is not supported; supported are: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
