"""Generation: one program that prefills a cache and decodes on the device."""

from moejax.generation.decode import generate_tokens
from moejax.generation.sampling import Sampling

__all__ = ["Sampling", "generate_tokens"]
