"""Flax NNX modules used as immutable pytrees: every call takes all it reads and returns all it computes."""

from moejax.layers.attention import Attention, AttentionConfig, Context, KeyValue
from moejax.layers.block import Block, BlockConfig, Routes
from moejax.layers.glu import GLU
from moejax.layers.linear import Linear
from moejax.layers.mixture_attention import MixtureAttention, MixtureAttentionConfig
from moejax.layers.mlp import MLP, MLPConfig
from moejax.layers.moe import MoE, MoEConfig
from moejax.layers.norm import RMSNorm
from moejax.layers.router import Router, RouterConfig

__all__ = [
    "GLU",
    "MLP",
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
    "RMSNorm",
    "Router",
    "RouterConfig",
    "Routes",
]
