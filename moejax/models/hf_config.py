"""Reading a Hugging Face ``config.json`` strictly: a field that nobody reads is an error, not a silent difference."""

from collections.abc import Mapping
from typing import Any

from moejax.errors import ConfigError

# Fields that cannot change what the forward pass of a released model computes.
_WITHOUT_EFFECT = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "dtype",
    "initializer_range",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    # PretrainedConfig's own, written by older versions of transformers for every model
    "bos_token_id",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "problem_type",
}
_REQUIRED = object()


class Fields:
    """The fields of a config, each marked as read when it is asked for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._read: set[str] = set()

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field ``name``; ``None`` counts as absent.

        Raises:
            ConfigError: absent and no default is given.
        """
        self._read.add(name)
        value = self._config.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"the model's config has no {name!r}; it is incomplete or of another family.")
        return default

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """The field ``name``, a positive integer.

        Raises:
            ConfigError: it is something else, or absent and no default is given.
        """
        value = self(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config field {name}={value!r} must be a positive integer.")
        return value

    def must_be(self, name: str, expected: Any) -> None:
        """Accept ``name`` only if absent or equal to ``expected``.

        Raises:
            ConfigError: another value, which would change the model in a way that is not implemented.
        """
        if (value := self(name, expected)) != expected:
            raise ConfigError(f"config field {name}={value!r} is not supported, only {expected!r} is.")

    def rope_theta(self) -> float:
        """Base of unscaled rotary positions, from ``rope_parameters`` (transformers 5) or ``rope_theta`` (4).

        Raises:
            ConfigError: a scaled variant.
        """
        self._read |= {"rope_parameters", "rope_theta", "rope_scaling"}
        rope = self._config.get("rope_parameters") or {}
        scaling = self._config.get("rope_scaling") or {}
        kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
        if kind != "default":
            raise ConfigError(f"rotary positions of type {kind!r} are not supported here, only 'default' is.")
        return float(rope.get("rope_theta") or self._config.get("rope_theta") or 10000.0)

    def eos_ids(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple: it may be absent, one id or several."""
        value = self("eos_token_id", ())
        return (value,) if isinstance(value, int) else tuple(value)

    def finish(self) -> None:
        """Raise ``ConfigError`` for fields that are set, were not read and may change the model."""
        unknown = {k: v for k, v in self._config.items() if k not in self._read | _WITHOUT_EFFECT}
        if unknown := {k: v for k, v in unknown.items() if v is not None and v is not False}:
            listed = ", ".join(f"{k}={v!r}" for k, v in sorted(unknown.items()))
            raise ConfigError(f"config fields that this family does not know and that may change the model: {listed}.")
