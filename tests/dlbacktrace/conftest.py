"""Tiny models of the four families in DLBacktrace's document, their tokenizer, and the runs that tests share."""

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
    """A ``transformers`` model with random weights; the second layer of the Qwen model is dense."""
    return torch_model(family, num_hidden_layers=LAYERS)


@cache
def tokenizer() -> Any:
    """A tokenizer whose token ``i`` is the word ``w{i}``; the first token is padding, the last the unknown word."""
    names = ["<pad>", *(f"w{i}" for i in range(1, VOCABULARY - 1)), "<unk>"]
    words = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@cache
def engine(family: str) -> Backtrace:
    """A Backtrace that tests share; each test asks for its results and does not read attributes of another test."""
    return Backtrace(model=small_torch(family), model_type=family, device="cpu")


def run(family: str = "olmoe", prompt: Any = None, **options: Any) -> dict[str, Any]:
    inputs = {"input_ids": torch.tensor([PROMPT])} if prompt is None else prompt
    defaults = {"tokenizer": tokenizer(), "max_new_tokens": STEPS, "return_relevance": True}
    return engine(family).run_task(inputs=inputs, **defaults | options)


@pytest.fixture(scope="session")
def results() -> dict[str, Any]:
    """Results of OLMoE with default options; tests must not change them."""
    return run(return_scores=True, return_layerwise_output=True)


def assert_close(ours: Any, other: Any, name: str = "", scale: float = 100.0) -> None:
    """Assert that values are equal to 1e-5 of ``scale``, the relevance at the start."""
    np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
