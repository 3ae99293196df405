"""Read a Hugging Face ``config.json`` strictly: each field is of a kind, none that may change the model goes unread."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.errors import ConfigError
from moejax.hugging_face import declared_fields
from moejax.models.hf_rope import read_rope
from moejax.models.kinds import (
    BASE,
    CONTEXT,
    INDICES,
    NUMBER,
    OBJECT,
    TEXT,
    TOKEN_ID,
    TOKEN_IDS,
    Kind,
    integer,
    list_of,
    number,
    one_of,
)
from moejax.models.object_fields import ObjectFields, refuse, tell_of
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


class Fields(ObjectFields):
    """The fields of a config; each is marked as read when it is asked for.

    A family's ``config(fields)`` asks for every field that it knows, and says of which kind it is
    (:mod:`moejax.models.kinds`). At the end, :meth:`finish` raises an error if the config has further fields that may
    change the model:

        >>> from moejax.models.kinds import EPSILON
        >>> fields = Fields({"hidden_size": 64, "num_local_experts": 8, "residual_multiplier": 0.22})
        >>> fields.size("hidden_size")
        64
        >>> fields.size("num_experts", alias="num_local_experts")
        8
        >>> fields("rms_norm_eps", EPSILON, 1e-5)
        1e-05
        >>> fields.finish()
        Traceback (most recent call last):
        moejax.errors.ConfigError: this family does not know these config fields, ..: residual_multiplier=0.22.

    Args:
        config: the fields of ``config.json``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config, "the model's config")
        self._own_rope_keys: set[str] = set()

    @property
    def _where(self) -> str:
        return ""

    def _default(self, name: str) -> Any:
        """The default of transformers' config class."""
        if (value := self._class_defaults().get(name)) is None:
            raise ConfigError(f"the model's config has no {name!r}; it is incomplete or belongs to another family.")
        return value

    def packed_as(self, method: str | None) -> None:
        """Check how the weights are quantised: by ``method``, or not at all.

        Raises:
            ConfigError: they are quantised by another method.
        """
        given = self("quantization_config", OBJECT, {})
        name = ObjectFields(given, "quantization_config")("quant_method", TEXT, "an unnamed method")
        if given and name != method:
            raise ConfigError(
                f"the weights are quantised by {name!r:.80}, which is not supported; take the unquantised model, or "
                "load it in transformers, call dequantize() and save_pretrained(), and load that folder."
            )

    def rope(
        self, default_theta: float = 10000.0, default: Mapping[str, Any] | None = None, *, kind: str | None = None
    ) -> Rope:
        """Return the rotary positions.

        They come from ``rope_parameters`` (transformers 5), or from ``rope_theta`` and ``rope_scaling`` (version 4),
        which wins where a config has both.

        Args:
            default_theta: the family's default base.
            default: the family's default of ``rope_parameters``.
            kind: the kind of layer whose positions are meant, where ``rope_parameters`` has an object for each kind.

        Raises:
            ConfigError: they are of a type that is not known here, lack a number or have one out of range, or turn a
                part of a head only.
        """
        given = self._rope_object(default)
        if kind is not None and kind in given:
            given = OBJECT.read(f"rope_parameters.{kind}", given[kind])
        original = self("original_max_position_embeddings", CONTEXT, None)
        theta = self("rope_theta", BASE, default_theta)
        type_ = given.get("rope_type") or given.get("type") or "default"
        positions = self.size("max_position_embeddings", None)
        if positions is None and type_ != "default":  # else transformers is imported for nothing
            positions = self._class_defaults().get("max_position_embeddings")
        fields = ObjectFields(given, f"rotary positions of type {type_!r:.40}")
        fields.without_effect(*self._own_rope_keys)
        if "partial_rotary_factor" not in self._own_rope_keys:
            self.must_be("partial_rotary_factor", 1.0)
            fields.must_be("partial_rotary_factor", 1.0)
        rope = read_rope(fields, theta, positions, original)
        fields.finish()
        return rope

    def _rope_object(self, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the config says of rotary positions beside their base."""
        given = self("rope_scaling", OBJECT, {}) or self("rope_parameters", OBJECT, default or {})
        self.without_effect("rope_parameters")
        return given

    def rope_number(self, name: str, kind: Kind = NUMBER) -> float | None:
        """Return a number among the rotary positions that this family alone reads; ``None`` if it is absent."""
        self._own_rope_keys.add(name)
        given = ObjectFields(self._rope_object(), "rotary positions")(name, kind, None)
        top = self(name, kind, None)
        return top if given is None else given

    def rotary_dim(self, head_dim: int, default: float = 1.0) -> int:
        """Return how many dimensions of a head turn, for a family of which a part of each head may turn.

        The share is ``partial_rotary_factor``, among the rotary positions or by itself, else ``default``. To be called
        before :meth:`rope`.
        """
        share = self.rope_number("partial_rotary_factor", number(most=1.0))
        return int(head_dim * (default if share is None else share))

    def head_dim(self, model_dim: int, heads: int, default: int | None = None) -> int:
        """Return ``head_dim``, by default the family's, else the model's width divided by the number of heads.

        Raises:
            ConfigError: the field is no size, or it is absent and the number of heads does not divide the width.
        """
        width = self.size("head_dim", default)
        if width is None and model_dim % heads:
            raise ConfigError(f"hidden_size={model_dim} is not divisible by num_attention_heads={heads}.")
        return width or model_dim // heads

    def common(self, *, max_positions: int, tied: bool = False) -> dict[str, Any]:
        """Return the fields of ``Config`` that all families read in the same way.

        Args:
            max_positions: the family's default of ``max_position_embeddings``.
            tied: the family's default of ``tie_word_embeddings``.

        Raises:
            ConfigError: one of them is of another kind, or padding has an id that the vocabulary lacks.
        """
        vocab_size, pad = self.size("vocab_size"), self._token("pad_token_id", TOKEN_ID)
        if pad is not None and pad >= vocab_size and "pad_token_id" in self._config:
            raise ConfigError(f"config field pad_token_id={pad} is outside the vocabulary of {vocab_size}.")
        return {
            "vocab_size": vocab_size,
            "tied": self.flag("tie_word_embeddings", tied),
            "max_positions": self.size("max_position_embeddings", max_positions),
            "eos_ids": self._token("eos_token_id", TOKEN_IDS) or (),
            # some configs have -1, which has no embedding
            "pad_id": pad if pad is not None and 0 <= pad < vocab_size else 0,
        }

    def no_window(self, layers: int) -> None:
        """Read the fields of Qwen's sliding window, which no published mixture uses.

        Raises:
            ConfigError: the window is switched on.
        """
        self.must_be("use_sliding_window", False)
        self.without_effect("sliding_window", "max_window_layers")
        self.layer_types(layers, ["full_attention"], ["full_attention"] * layers)

    def layer_types(self, layers: int, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
        """Return ``layer_types``, which names the attention of each of ``layers`` layers.

        Args:
            layers: the number of layers.
            known: the names that the family has.
            default: the names if the field is absent.

        Raises:
            ConfigError: it is no list of that many names, or a name is not known.
        """
        return self("layer_types", list_of(one_of(known), layers), tuple(default))

    def windows(self, layers: int, default: int | None = None, *, switched: bool = True) -> list[int | None]:
        """Return the window of each layer, ``None`` for a layer that sees all tokens.

        They come from ``layer_types``; without these, layers from ``max_window_layers`` on have the window.

        Args:
            layers: number of layers.
            default: the family's default of ``sliding_window``.
            switched: the window applies only with ``use_sliding_window``.
        """
        window = self.size("sliding_window", default)
        if switched and not self.flag("use_sliding_window", False):
            window = None
        first = self("max_window_layers", integer(0, 2**24), layers)
        kinds = "full_attention", "sliding_attention"
        usual = [kinds[window is not None and i >= first] for i in range(layers)]
        return [window if kind == kinds[1] else None for kind in self.layer_types(layers, kinds, usual)]

    def are_mixtures(self, layers: int) -> list[bool]:
        """Return of each layer of a Qwen model whether it is a mixture.

        It is one if it is not in ``mlp_only_layers``, and if its number, counted from one, is a multiple of
        ``decoder_sparse_step``.
        """
        step, dense = self.size("decoder_sparse_step", 1), set(self("mlp_only_layers", INDICES, ()))
        return [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]

    def size_or_none(self, name: str, default: int) -> int | None:
        """Return a size whose absence means the default, and whose ``None`` means none."""
        self._read.add(name)
        return self.size(name, None) if name in self._config else default

    def _token(self, name: str, kind: Kind) -> Any:
        """Return a field with token ids; one that is absent, not ``None``, has the default of transformers' class."""
        self._read.add(name)
        value = self._config[name] if name in self._config else self._class_defaults().get(name)
        return None if value is None else kind.read(name, value)

    def _class_defaults(self) -> Mapping[str, Any]:
        """The defaults of transformers' config class; empty where it has none."""
        return self._declared() or {}

    def _declared(self) -> Mapping[str, Any] | None:
        kind = self._config.get("model_type")
        return declared_fields(kind) if isinstance(kind, str) else None

    def finish(self) -> None:
        """Check that all fields that may change the model were read.

        A field that transformers' config class of this ``model_type`` does not declare is a note of some tool: it is
        named in a warning. A declared field that was not read must have the class's default. If transformers does not
        know the model type, every field must have been read, unless it is false. Unread fields that are ``None`` are
        fine.

        Raises:
            ConfigError: a field that was not read may change the model.
        """
        if "quantization_config" not in self._read:
            self.packed_as(None)
        unread = {k: v for k, v in self._unread().items() if k not in _WITHOUT_EFFECT}
        if not unread:
            return
        declared = self._declared()
        notes = [k for k, v in unread.items() if k not in (declared or unread) and v is not False]
        tell_of(notes, "the config has fields that change nothing in this family")
        refuse({k: v for k, v in unread.items() if _may_change(k, v, declared)})


def _may_change(name: str, value: Any, declared: Mapping[str, Any] | None) -> bool:
    """Return whether a field that was not read may change the model."""
    if declared is None:
        return value is not False
    return name in declared and _plain(declared[name]) != value


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
