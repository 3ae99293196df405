"""Comparison of numbers."""

from typing import Any

import numpy as np


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Assert equal shapes, and equal values up to ``tolerance`` times the largest value of ``theirs``."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(initial=0))


def relative_rms(ours: Any, theirs: Any, where: np.ndarray | None = None) -> float:
    """Root mean square of the difference, divided by that of ``theirs``, in float64.

    Args:
        where: booleans for the leading axes: which entries count. All by default.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))
