"""Orbax checkpoints between one device and four."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny.four_devices import LAYOUTS, decoder, hugging_face, mesh, spread

from models.sharding.placement import check_parts
from moejax import load
from moejax.checkpoints import convert, save_folder
from moejax.models import Decoder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt_oss", "jetmoe", "qwen3_moe"])
def test_a_converted_model_restores_on_four_devices(name: str, layout: str, tmp_path: Path) -> None:
    save_folder(decoder(name), hugging_face(name), tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "orbax")
    check_parts(load(tmp_path / "orbax", mesh=mesh(layout)).decoder, decoder(name), layout)
    for ours, theirs in zip(_leaves(load(tmp_path / "orbax").decoder), _leaves(decoder(name)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_over_four_devices_is_written_and_restores_on_one(layout: str, tmp_path: Path) -> None:
    save_folder(spread("olmoe", layout).decoder, hugging_face("olmoe"), tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "orbax")
    for folder in ("published", "orbax"):
        restored = load(tmp_path / folder).decoder
        for ours, theirs in zip(_leaves(restored), _leaves(decoder("olmoe")), strict=True):
            assert len(ours.devices()) == 1
            np.testing.assert_array_equal(ours, theirs)


def _leaves(tree: Decoder) -> list[jax.Array]:
    return jax.tree.leaves(tree)
