"""Decoders of our own: Llama's architecture with any registered MoE layer in it. Leaves are stored under their paths.

The fields have the names of Hugging Face configs. Beside those of Llama:

    moe                     name of a registered layer; without it every layer is dense
    moe_args                its settings; experts are as wide as ``intermediate_size``, gated, and without biases
    num_experts, num_experts_per_tok
    moe_layers              indices of the layers that are mixtures, by default all
    dense_intermediate_size width of the others, by default ``intermediate_size``
    num_attention_experts, num_attention_experts_per_tok   attention is a mixture of experts, as in JetMoE
    qk_norm                 "full" or "head": queries and keys are normalised
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax.errors import ConfigError
from moejax.layers import (
    GLU,
    Activation,
    AttentionConfig,
    BlockConfig,
    MixtureAttentionConfig,
    MLPConfig,
    RegisteredConfig,
    RouterConfig,
)
from moejax.models.config import Config
from moejax.models.families._shared import grouped_query
from moejax.models.family import register_family
from moejax.models.hf_config import Fields
from moejax.models.keys import KeyTable, Source, whole
from moejax.models.kinds import ACTIVATION, EPSILON, INDICES, OBJECT, TEXT, integer, one_of
from moejax.models.old_paths import old_path


class _OwnPaths(Mapping[str, Sequence[Source]]):
    """Every leaf under its own path; the registered layer decides the paths."""

    def __getitem__(self, path: str) -> Sequence[Source]:
        # an older version may have written the file
        return [whole(old_path(path, {"model_type": "moejax"})), whole(path)]

    def __contains__(self, path: Any) -> bool:
        return not path.endswith((".blocks", ".scales"))

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


KEYS: KeyTable = _OwnPaths()

_MAYBE_NONE = integer(0, 100_000)
"""A number of attention experts; 0 for attention without experts."""


def write_config(config: Config) -> dict[str, Any]:
    """The fields above for this architecture; raises ``AttributeError`` where a part lacks what it needs."""
    mixtures: dict[int, Any] = {
        i: b.feed_forward for i, b in enumerate(config.blocks) if b.half("feed_forward").sizes.num_experts
    }
    moe, attention = next(iter(mixtures.values()), None), config.blocks[0].attention
    if moe is None:
        raise ConfigError("no layer is a mixture; a dense model has a family of its own.")
    defaults = type(moe.args)()
    settings = {f.name: getattr(moe.args, f.name) for f in dataclasses.fields(moe.args) if f.name != "key"}
    always = {"expert_dim", "activation", "gated", "expert_bias"}
    out: dict[str, Any] = {
        "model_type": "moejax",
        "moe": moe.name,
        "moe_args": {k: v for k, v in settings.items() if k in always or v != getattr(defaults, k)},
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_selected,
        "hidden_act": settings["activation"],
        "gated": settings["gated"],
        "intermediate_size": settings["expert_dim"],
        "attention_bias": getattr(attention, "bias"),  # noqa: B009 - only grouped-query attention has it
        "qk_norm": getattr(attention, "qk_norm"),  # noqa: B009
    }
    if len(mixtures) < config.num_layers:
        out |= {"moe_layers": list(mixtures), "dense_intermediate_size": config.dense_dim}
    return out


@register_family("moejax", KEYS, write_config=write_config)
def config(fields: Fields) -> Config:
    """Map the fields above."""
    layers, eps = fields.size("num_hidden_layers"), fields("rms_norm_eps", EPSILON, 1e-5)
    chosen = set(fields("moe_layers", INDICES, range(layers)))
    attention, dense, mixture = _attention(fields, eps), _dense(fields), _mixture(fields)
    return Config(
        model_type="moejax",
        blocks=tuple(
            BlockConfig(attention, mixture if mixture and layer in chosen else dense, eps) for layer in range(layers)
        ),
        norm_eps=eps,
        **fields.common(max_positions=2048),
    )


def _attention(fields: Fields, eps: float) -> AttentionConfig | MixtureAttentionConfig:
    experts, bias = fields("num_attention_experts", _MAYBE_NONE, 0), fields.flag("attention_bias", False)
    plain = grouped_query(
        fields, eps, bias=bias, output_bias=bias, qk_norm=fields("qk_norm", one_of(["full", "head"]), None)
    )
    if not experts:
        return plain
    router = RouterConfig(experts, fields.size("num_attention_experts_per_tok"), weigh="renormalised")
    return MixtureAttentionConfig(plain.model_dim, plain.num_kv_heads, plain.head_dim, router, plain.rope)


def _dense(fields: Fields) -> MLPConfig:
    width, act = fields.size("intermediate_size"), fields("hidden_act", ACTIVATION, "silu")
    unit = GLU(act) if fields.flag("gated", True) else Activation(act)
    return MLPConfig(fields.size("hidden_size"), fields.size("dense_intermediate_size", width), unit)


def _mixture(fields: Fields) -> RegisteredConfig | None:
    name, args = fields("moe", TEXT, None), fields("moe_args", OBJECT, {})
    experts, selected = fields.size("num_experts", None), fields.size("num_experts_per_tok", None)
    if name is None:
        return None
    usual = {
        "expert_dim": fields.size("intermediate_size"),
        "activation": fields("hidden_act", ACTIVATION, "silu"),
        "gated": fields.flag("gated", True),
        "expert_bias": False,
    }
    return RegisteredConfig(name, fields.size("hidden_size"), experts or 8, selected or 2, usual | args)
