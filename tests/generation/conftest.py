"""One tiny model's greedy answers, as transformers gives them."""

from typing import Any

import pytest

from generation.reference import PROMPTS, theirs

NEW = 40


@pytest.fixture(scope="session")
def greedy(toy_torch: Any) -> list[list[int]]:
    """What transformers continues each prompt with: ``NEW`` tokens."""
    return [theirs(toy_torch, prompt, NEW).new[0] for prompt in PROMPTS]
