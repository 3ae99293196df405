"""Operations on arrays: a plain reference of each one, and faster implementations."""

from moejax.ops import int8, mxfp4  # registers the packed formats

__all__ = ["int8", "mxfp4"]
