"""Flax NNX modules used as immutable pytrees: every call takes all it reads and returns all it computes."""

from moejax.layers.attention import Attention, AttentionConfig, Context, KeyValue
from moejax.layers.block import Block
from moejax.layers.linear import Linear
from moejax.layers.moe import MoE, MoEConfig
from moejax.layers.norm import RMSNorm

__all__ = [
    "Attention",
    "AttentionConfig",
    "Block",
    "Context",
    "KeyValue",
    "Linear",
    "MoE",
    "MoEConfig",
    "RMSNorm",
]
