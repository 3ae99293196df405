"""Generation: one program that prefills a cache and decodes on the device."""

from moejax.generation.decode import generate_tokens
from moejax.generation.sampling import Sampling
from moejax.generation.step import Generation

__all__ = ["Generation", "Sampling", "generate_tokens"]
