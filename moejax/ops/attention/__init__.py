"""Scaled dot-product attention with grouped key/value heads, an explicit mask and learned sinks."""

from moejax.ops.attention.choice import attention

__all__ = ["attention"]
