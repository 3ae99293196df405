"""The decoder, its configuration, and one file for each family."""

from moejax.models.config import Config
from moejax.models.decoder import Cache, Decoder, Hidden
from moejax.models.families import FAMILIES, family
from moejax.models.flat import FlatDecoder, unflatten
from moejax.models.recording import record
from moejax.models.sharding import EXPERT, EXPERT_TENSOR, TENSOR, Rules, exchanging, shard, shardings

__all__ = [
    "EXPERT",
    "EXPERT_TENSOR",
    "FAMILIES",
    "TENSOR",
    "Cache",
    "Config",
    "Decoder",
    "FlatDecoder",
    "Hidden",
    "Rules",
    "exchanging",
    "family",
    "record",
    "shard",
    "shardings",
    "unflatten",
]
