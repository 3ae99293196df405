"""Generation: one compiled program that fills a cache with the prompts and decodes on the device.

Letters of shapes in this room, beside the common ones: ``B`` prompts, ``W`` beams of a prompt, ``Q`` rows of the batch
(a prompt takes one row for each beam or draw, side by side), ``A`` new tokens of a row (at most), ``Z`` tokens of a
row's history (prompt and new tokens), ``Y`` candidates of a beam search.
"""

from moejax.generation.decode import generate_tokens
from moejax.generation.sampling import Sampling
from moejax.generation.step import Generation

__all__ = ["Generation", "Sampling", "generate_tokens"]
