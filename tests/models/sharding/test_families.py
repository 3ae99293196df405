"""Families with parts of their own over four emulated devices: the logits are those of one device."""

from typing import Any

import numpy as np
import pytest
from tiny.compare import relative_rms
from tiny.four_devices import LAYOUTS, mesh
from tiny.hugging_face import random_batch, torch_model

from moejax import load

pytestmark = pytest.mark.slow

_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100}
SIZES: dict[str, dict[str, Any]] = {
    "afmoe": _HEADS | {"num_experts": 8},
    "deepseek_v3": _HEADS | {"num_key_value_heads": 8},
    "granitemoeshared": _HEADS | {"num_local_experts": 8, "hidden_size": 48},
}
"""Changes after which four devices divide heads, experts, hidden units and vocabulary."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SIZES)
def test_logits_and_answers_are_those_of_one_device(name: str, layout: str) -> None:
    model = torch_model(name, **SIZES[name])
    tokens, valid = random_batch()
    one, four = load(model), load(model, mesh=mesh(layout), sharding=LAYOUTS[layout][1])
    got, want = (np.asarray(lm(tokens, valid=valid))[valid] for lm in (four, one))
    assert relative_rms(got, want) <= 1e-5
    prompts = [tokens[0, :11].tolist(), tokens[1, :5].tolist()]
    assert four.generate_ids(prompts, max_new_tokens=12) == one.generate_ids(prompts, max_new_tokens=12)
