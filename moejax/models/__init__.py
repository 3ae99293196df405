"""The decoder, its configuration, and one file for each family."""

from moejax.models.config import Config
from moejax.models.decoder import Cache, Decoder, Hidden
from moejax.models.families import FAMILIES, family
from moejax.models.packed import Packed, unpack

__all__ = ["FAMILIES", "Cache", "Config", "Decoder", "Hidden", "Packed", "family", "unpack"]
