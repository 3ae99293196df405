"""The model inside the package: its files fit its config, and are what README and RESULTS say they are."""

import jax
import numpy as np
import pytest

import moejax

pytestmark = pytest.mark.fast


def test_bundled_model() -> None:
    lm = moejax.load("tiny-olmoe", dtype="float32")
    assert (lm.config.num_layers, lm.config.num_experts) == (4, 16)
    leaves = jax.tree.leaves(lm.decoder)
    assert sum(leaf.size for leaf in leaves) == pytest.approx(5.72e6, rel=1e-3)
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)
    assert lm.pieces(lm.encode("And the LORD said")) == ["And", " the", " LORD", " said"]
