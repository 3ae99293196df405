"""The decoder, its configuration, its placement over devices, and one file for each family."""

from moejax.models.activations import apply, record
from moejax.models.config import Config
from moejax.models.decoder import Cache, Decoder, Hidden
from moejax.models.family import FAMILIES, Family, family, register_family
from moejax.models.flat import FlatDecoder, unflatten
from moejax.models.hf_config import Fields
from moejax.models.node_table import NodeTable, nodes
from moejax.models.sharding import EXPERT, EXPERT_TENSOR, TENSOR, ShardingRules, exchanging, shard, shardings

__all__ = [
    "EXPERT",
    "EXPERT_TENSOR",
    "FAMILIES",
    "TENSOR",
    "Cache",
    "Config",
    "Decoder",
    "Family",
    "Fields",
    "FlatDecoder",
    "Hidden",
    "NodeTable",
    "ShardingRules",
    "apply",
    "exchanging",
    "family",
    "nodes",
    "record",
    "register_family",
    "shard",
    "shardings",
    "unflatten",
]
