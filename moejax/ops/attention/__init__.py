"""Scaled dot-product attention with grouped key/value heads, an explicit mask and learned sinks."""

from moejax.ops.attention.api import attention, block_size

__all__ = ["attention", "block_size"]
