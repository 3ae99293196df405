"""Formats of Orbax folders that older versions wrote and that can still be read."""

READABLE = (2,)
"""The older formats that can be read beside the current one (:data:`moejax.checkpoints.orbax.FORMAT`)."""
