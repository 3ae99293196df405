"""The families' tiny models as they are published, under the names that the tests of this folder use."""

from tiny.hugging_face import FAMILIES
from tiny.hugging_face import publish as write
from tiny.hugging_face import published as make

__all__ = ["FAMILIES", "make", "write"]
