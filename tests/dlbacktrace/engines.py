"""Tiny models of the four families that DLBacktrace names, their tokenizer, and one run of each that tests share."""

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from tiny.hugging_face import VOCABULARY, torch_model
from tiny.tokenizers import words

from moejax import Backtrace

FOUR = ["olmoe", "jetmoe", "qwen3_moe", "gpt_oss"]
LAYERS, PROMPT, STEPS = 2, [5, 80, 33, 61, 2, 33, 12], 3


def small_torch(family: str) -> Any:
    """A model of two layers; Qwen's second layer is dense."""
    return torch_model(family, num_hidden_layers=LAYERS)


@cache
def tokenizer() -> Any:
    """A tokenizer whose token ``i`` is the word ``w{i}``, but the first pads and the last is unknown."""
    backend = words(VOCABULARY, {0: "<pad>", VOCABULARY - 1: "<unk>"}, unknown=VOCABULARY - 1)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@cache
def engine(family: str) -> Backtrace:
    """Shared between tests: a test asks for results anew and never reads attributes that another test has set."""
    return Backtrace(model=small_torch(family), model_type=family, device="cpu")


def run(family: str = "olmoe", prompt: Any = None, **options: Any) -> dict[str, Any]:
    """Results of ``run_task`` for :data:`PROMPT` or another prompt."""
    inputs = {"input_ids": torch.tensor([PROMPT])} if prompt is None else prompt
    defaults = {"tokenizer": tokenizer(), "max_new_tokens": STEPS, "return_relevance": True}
    return engine(family).run_task(inputs=inputs, **defaults | options)


def assert_close(ours: Any, other: Any, name: str = "", scale: float = 100.0) -> None:
    """Assert equality to 1e-5 of the relevance at the start, which is 100."""
    np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * scale, err_msg=name)
