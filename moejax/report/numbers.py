"""Numbers as JSON has them: one that is not finite is null."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def number(value: Any) -> float | None:
    """Return a number; ``None`` for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def listed(values: Any) -> Any:
    """Return an array as nested lists; NaN and infinity are ``None``."""
    array = np.asarray(values)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array.tolist()
    plain = array.astype(object)
    plain[~np.isfinite(array)] = None
    return plain.tolist()


def finite(value: Any) -> Any:
    """Return plain data with ``None`` for each NaN and infinity in it."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
