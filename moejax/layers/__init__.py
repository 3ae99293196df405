"""Flax NNX modules used as immutable pytrees: every call takes all it reads and returns all it computes."""

from moejax.layers.attention.grouped_query import Attention, AttentionConfig, Context, KeyValue
from moejax.layers.attention.mixture import MixtureAttention, MixtureAttentionConfig
from moejax.layers.block import Block, BlockConfig, Routes
from moejax.layers.feed_forward.activation import GLU, Activation
from moejax.layers.feed_forward.dense import MLP, MLPConfig
from moejax.layers.feed_forward.mixture import MoE, MoEConfig
from moejax.layers.feed_forward.moe_layer import MoeArgs, MoeLayer
from moejax.layers.feed_forward.registry import RegisteredConfig, get_moe, register_moe, registered
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm

__all__ = [
    "GLU",
    "MLP",
    "Activation",
    "Attention",
    "AttentionConfig",
    "Block",
    "BlockConfig",
    "Context",
    "KeyValue",
    "Linear",
    "MLPConfig",
    "MixtureAttention",
    "MixtureAttentionConfig",
    "MoE",
    "MoEConfig",
    "MoeArgs",
    "MoeLayer",
    "RMSNorm",
    "RegisteredConfig",
    "Router",
    "RouterConfig",
    "Routes",
    "get_moe",
    "register_moe",
    "registered",
]
