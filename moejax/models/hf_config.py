"""Read a Hugging Face ``config.json`` strictly: no field that may change the model goes unread in silence."""

import warnings
from collections.abc import Mapping
from typing import Any

from moejax.errors import ConfigError
from moejax.hugging_face import declared_fields
from moejax.models.hf_rope import read_rope
from moejax.ops.rope import Rope

# Fields that cannot change the forward pass of a released model.
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
    "transformers.js_config",
    "transformers_version",
    "use_cache",
    # fields of PretrainedConfig, which older versions of transformers write for every model
    "bos_token_id",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "problem_type",
}
_REQUIRED = object()
"""Stands for the default of a field that must be present."""


class Fields:
    """The fields of a config; each is marked as read when it is asked for.

    A family's ``config(fields)`` asks for every field that it knows. At the end, :meth:`finish` raises an error if the
    config has further fields that may change the model:

        >>> fields = Fields({"hidden_size": 64, "num_local_experts": 8, "residual_multiplier": 0.22})
        >>> fields.size("hidden_size")
        64
        >>> fields.size("num_experts", alias="num_local_experts")
        8
        >>> fields("rms_norm_eps", 1e-5)
        1e-05
        >>> fields.finish()
        Traceback (most recent call last):
        moejax.errors.ConfigError: this family does not know these config fields, ..: residual_multiplier=0.22.

    Args:
        config: the fields of ``config.json``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._read: set[str] = set()

    def __call__(self, name: str, default: Any = _REQUIRED, *, alias: str | None = None) -> Any:
        """Return a field; a field that is ``None`` counts as absent.

        Args:
            name: the name of the field.
            default: the value if the field is absent; if it is not given, the default of transformers' config class.
            alias: the name of the field in other versions of transformers.

        Raises:
            ConfigError: the field is absent, and there is no default.
        """
        required = default is _REQUIRED
        for key in (name, alias):
            if key is not None:
                self._read.add(key)
                if self._config.get(key) is not None:
                    return self._config[key]
        if default is _REQUIRED:
            default = (declared_fields(str(self._config.get("model_type"))) or {}).get(name)
        if default is None and required:
            raise ConfigError(f"the model's config has no {name!r}; it is incomplete or belongs to another family.")
        return default

    def given(self, name: str, default: Any) -> Any:
        """Return a field that means something as ``None``; only if it is absent, the default."""
        self._read.add(name)
        return self._config.get(name, default)

    def rope_number(self, name: str) -> float | None:
        """Return a number of ``rope_parameters`` or ``rope_scaling`` that only some family knows."""
        given = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        value = given.get(name, self._config.get(name))
        return None if value is None else float(value)

    def size(self, name: str, default: Any = _REQUIRED, *, alias: str | None = None) -> int:
        """Return a field that must be a positive integer; the arguments are as in :meth:`__call__`.

        Raises:
            ConfigError: the field is not a positive integer, or it is absent and no default is given.
        """
        value = self(name, default, alias=alias)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config field {name}={value!r} must be a positive integer.")
        return value

    def must_be(self, name: str, expected: Any) -> None:
        """Accept the field ``name`` only if it is absent or equal to ``expected``.

        Raises:
            ConfigError: the field has another value, which would change the model in a way that is not implemented.
        """
        if (value := self(name, expected)) != expected:
            raise ConfigError(f"config field {name}={value!r} is not supported, only {expected!r} is.")

    def packed_as(self, method: str | None) -> None:
        """Check how the weights are quantised: by ``method``, or not at all.

        Raises:
            ConfigError: they are quantised by another method.
        """
        given = self("quantization_config", None) or {}
        name = given.get("quant_method", "an unnamed method") if isinstance(given, Mapping) else given
        if given and name != method:
            raise ConfigError(
                f"the weights are quantised by {name!r}, which is not supported; take the unquantised model, or "
                "load it in transformers, call dequantize() and save_pretrained(), and load that folder."
            )

    def rope(
        self, default_theta: float = 10000.0, default: Mapping[str, Any] | None = None, *, kind: str | None = None
    ) -> Rope:
        """Return the rotary positions.

        They come from ``rope_parameters`` (transformers 5), or from ``rope_theta`` and ``rope_scaling`` (version 4).

        Args:
            default_theta: the family's default base.
            default: the family's default of ``rope_parameters``, where the config says nothing of positions.
            kind: the kind of layer whose positions are meant, where ``rope_parameters`` has one object for each kind.

        Raises:
            ConfigError: they are of a type that is not known here, lack a number, or turn a part of a head only.
        """
        self._read |= {"rope_parameters", "rope_theta", "rope_scaling"}
        given = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if default is not None and not ({"rope_parameters", "rope_theta", "rope_scaling"} & self._config.keys()):
            given = default
        if kind is not None and kind in given:
            given = given[kind]
        if "partial_rotary_factor" in self._read:
            given = {name: value for name, value in given.items() if name != "partial_rotary_factor"}
        original = self._config.get("original_max_position_embeddings")
        if original is not None:
            self._read.add("original_max_position_embeddings")
        positions = self("max_position_embeddings", None)
        return read_rope(given, self._config.get("rope_theta") or default_theta, positions, original)

    def rotary_dim(self, head_dim: int, default: float = 1.0) -> int:
        """Return how many dimensions of a head turn, for a family of which a part of each head may turn.

        The share is ``partial_rotary_factor``, in ``rope_parameters`` or by itself, else ``default``. To be called
        before :meth:`rope`.
        """
        self._read.add("partial_rotary_factor")
        given = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        share = given.get("partial_rotary_factor", self._config.get("partial_rotary_factor"))
        return int(head_dim * (default if share is None else share))

    def head_dim(self, model_dim: int, heads: int, default: int | None = None) -> int:
        """Return ``head_dim``, by default the family's, else the model's width divided by the number of heads.

        Raises:
            ConfigError: the field is absent, and the number of heads does not divide the width.
        """
        if self("head_dim", default) is None and model_dim % heads:
            raise ConfigError(f"hidden_size={model_dim} is not divisible by num_attention_heads={heads}.")
        return self.size("head_dim", default or model_dim // heads)

    def common(self, *, max_positions: int, tied: bool = False) -> dict[str, Any]:
        """Return the fields of ``Config`` that all families read in the same way.

        Args:
            max_positions: the family's default of ``max_position_embeddings``.
            tied: the family's default of ``tie_word_embeddings``.
        """
        return {
            "vocab_size": self.size("vocab_size"),
            "tied": self("tie_word_embeddings", tied),
            "max_positions": self.size("max_position_embeddings", max_positions),
            "eos_ids": self.eos_ids(),
            # some configs have -1, which has no embedding
            "pad_id": max(self._token("pad_token_id") or 0, 0),
        }

    def no_window(self) -> None:
        """Read the fields of Qwen's sliding window, which no published mixture uses.

        Raises:
            ConfigError: the window is switched on.
        """
        self.must_be("use_sliding_window", False)
        for name in ("sliding_window", "max_window_layers"):
            self(name, None)
        kinds = self("layer_types", [])
        if set(kinds) - {"full_attention"}:
            raise ConfigError(f"config field layer_types={kinds!r} is not supported, only full attention is.")

    def windows(self, layers: int, default: int | None = None, *, switched: bool = True) -> list[int | None]:
        """Return the window of each layer, ``None`` for a layer that sees all tokens.

        They come from ``layer_types``; without these, layers from ``max_window_layers`` on have the window.

        Args:
            layers: number of layers.
            default: the family's default of ``sliding_window``.
            switched: the window applies only with ``use_sliding_window``.
        """
        window = self.given("sliding_window", default)
        if switched and not self("use_sliding_window", False):
            window = None
        first = self("max_window_layers", layers)
        kinds = self("layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
            raise ConfigError(
                f"config field layer_types={kinds!r:.200} does not name the kind of each of {layers} layers."
            )
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer of a Qwen model is a mixture.

        It is one if it is not in ``mlp_only_layers``, and if its number, counted from one, is a multiple of
        ``decoder_sparse_step``.
        """
        step, dense = self("decoder_sparse_step", 1), self("mlp_only_layers", ())
        return layer not in dense and (layer + 1) % step == 0

    def eos_ids(self) -> tuple[int, ...]:
        """Return ``eos_token_id``, which may be absent, one id or several, as a tuple."""
        value = self._token("eos_token_id")
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    def _token(self, name: str) -> Any:
        """Return a field with token ids; one that is absent, not ``None``, has the default of transformers' class."""
        self._read.add(name)
        if name in self._config:
            return self._config[name]
        return (declared_fields(str(self._config.get("model_type"))) or {}).get(name)

    def finish(self) -> None:
        """Check that all fields that may change the model were read.

        A field that transformers' config class of this ``model_type`` does not declare is a note of some tool: it is
        named in a warning. A declared field that was not read must have the class's default. If transformers does not
        know the model type, every field must have been read. Unread fields that are ``None`` or false are fine.

        Raises:
            ConfigError: a field that was not read may change the model.
        """
        if "quantization_config" not in self._read:
            self.packed_as(None)
        unread = {k: v for k, v in self._config.items() if k not in self._read | _WITHOUT_EFFECT}
        unread = {k: v for k, v in unread.items() if v is not None and v is not False}
        if not unread:
            return
        declared = declared_fields(str(self._config.get("model_type")))
        if declared is None:
            unknown = unread
        else:
            unknown = {k: v for k, v in unread.items() if k in declared and _plain(declared[k]) != v}
            if notes := sorted(unread.keys() - declared.keys()):
                text = f"the config has fields that change nothing in this family and are kept: {', '.join(notes)}."
                warnings.warn(text, stacklevel=2)
        if unknown:
            listed = ", ".join(f"{k}={v!r:.80}" for k, v in sorted(unknown.items()))
            raise ConfigError(f"this family does not know these config fields, which may change the model: {listed}.")


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
