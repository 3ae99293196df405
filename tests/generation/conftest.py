"""Greedy answers of one tiny model, as transformers gives them."""

from typing import Any

import pytest

from generation.reference import NEW, PROMPTS, theirs


@pytest.fixture(scope="session")
def greedy(toy_torch: Any) -> list[list[int]]:
    """The ``NEW`` tokens with which transformers continues each prompt."""
    return [theirs(toy_torch, prompt, NEW).new[0] for prompt in PROMPTS]
