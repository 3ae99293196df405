"""Tiny models of the document's four families, their tokenizer, and one run of each that the tests share."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from families.build import VOCABULARY, torch_model

from moejax import Backtrace

FOUR = ["olmoe", "jetmoe", "qwen3_moe", "gpt_oss"]
LAYERS, PROMPT, STEPS = 2, [5, 80, 33, 61, 2, 33, 12], 3


def small_torch(family: str) -> Any:
    """Qwen's second layer is dense."""
    return torch_model(family, num_hidden_layers=LAYERS)


@cache
def tokenizer() -> Any:
    """Token ``i`` is the word ``w{i}``, but the first pads and the last is unknown."""
    names = ["<pad>", *(f"w{i}" for i in range(1, VOCABULARY - 1)), "<unk>"]
    words = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@cache
def engine(family: str) -> Backtrace:
    """Shared between tests: results are asked for anew, never read from another test's attributes."""
    return Backtrace(model=small_torch(family), model_type=family, device="cpu")


def run(family: str = "olmoe", prompt: Any = None, **options: Any) -> dict[str, Any]:
    inputs = {"input_ids": torch.tensor([PROMPT])} if prompt is None else prompt
    defaults = {"tokenizer": tokenizer(), "max_new_tokens": STEPS, "return_relevance": True}
    return engine(family).run_task(inputs=inputs, **defaults | options)


@pytest.fixture(scope="session")
def results() -> dict[str, Any]:
    """The plain run of OLMoE, not to be changed."""
    return run(return_scores=True, return_layerwise_output=True)


def assert_close(ours: Any, other: Any, name: str = "", scale: float = 100.0) -> None:
    """Equal to 1e-5 of the relevance at the start."""
    np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
