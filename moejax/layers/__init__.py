"""Flax NNX modules used as immutable pytrees: every call takes all it reads and returns all it computes."""

from moejax.layers.attention import Attention, AttentionConfig, Context, KeyValue
from moejax.layers.block import Block, BlockConfig, Routes
from moejax.layers.glu import GLU, Activation
from moejax.layers.linear import Linear
from moejax.layers.mixture_attention import MixtureAttention, MixtureAttentionConfig
from moejax.layers.mlp import MLP, MLPConfig
from moejax.layers.moe import MoE, MoEConfig
from moejax.layers.moe_layer import MoeArgs, MoeLayer
from moejax.layers.norm import RMSNorm
from moejax.layers.registry import RegisteredConfig, get_moe, register_moe, registered
from moejax.layers.router import Router, RouterConfig

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
