"""Flax NNX modules used as immutable pytrees: every call takes all it reads and returns all it computes."""

from moejax.layers.attention.grouped_query import Attention, AttentionConfig, KeyValue
from moejax.layers.attention.latent import LatentAttention, LatentAttentionConfig
from moejax.layers.attention.mixture import MixtureAttention, MixtureAttentionConfig
from moejax.layers.block import Block, BlockAux, BlockConfig
from moejax.layers.feed_forward.activation import GLU, Activation, HiddenActivation
from moejax.layers.feed_forward.dense import MLP, MLPConfig
from moejax.layers.feed_forward.expert_stack import ExpertStack
from moejax.layers.feed_forward.experts import Experts
from moejax.layers.feed_forward.initial_experts import stack_experts
from moejax.layers.feed_forward.mixture import Mixture, MixtureConfig
from moejax.layers.feed_forward.module_experts import ModuleExperts
from moejax.layers.feed_forward.moe_args import MoeArgs
from moejax.layers.feed_forward.moe_layer import MoeLayer, RouteCounts
from moejax.layers.feed_forward.registry import LAYERS, RegisteredConfig, get_moe, register_moe, registered
from moejax.layers.feed_forward.router import Router, RouterConfig
from moejax.layers.feed_forward.shared import SharedConfig, SharedExpert
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm, WideRMSNorm
from moejax.layers.parts import ActivationSizes, Aux, Axes, Call, Part, PartConfig, Role, Sizes
from moejax.layers.rotary import Rotary, Rotation

__all__ = [
    "GLU",
    "LAYERS",
    "MLP",
    "Activation",
    "ActivationSizes",
    "Attention",
    "AttentionConfig",
    "Aux",
    "Axes",
    "Block",
    "BlockAux",
    "BlockConfig",
    "Call",
    "ExpertStack",
    "Experts",
    "HiddenActivation",
    "KeyValue",
    "LatentAttention",
    "LatentAttentionConfig",
    "Linear",
    "MLPConfig",
    "Mixture",
    "MixtureAttention",
    "MixtureAttentionConfig",
    "MixtureConfig",
    "ModuleExperts",
    "MoeArgs",
    "MoeLayer",
    "Part",
    "PartConfig",
    "RMSNorm",
    "RegisteredConfig",
    "Role",
    "Rotary",
    "Rotation",
    "RouteCounts",
    "Router",
    "RouterConfig",
    "SharedConfig",
    "SharedExpert",
    "Sizes",
    "WideRMSNorm",
    "get_moe",
    "register_moe",
    "registered",
    "stack_experts",
]
