"""What all tests share: shapes checked at run time, JAX on the CPU, no network, and tiny models.

Sizes are all different, so that a swapped axis cannot pass: B=3, T=7, L=2, D=48, H=8, G=4, C=6, F=14, E=9, K=5, V=53.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# compiling is most of the time, and of tiny programs the optimiser makes nothing better; this halves it
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import jaxtyping
import numpy as np
import pytest
from programs import forget_if_many

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("moejax") is None:
    sys.path.insert(0, str(ROOT))
assert "moejax" not in sys.modules, "moejax was imported before its shapes could be checked"
jaxtyping.install_import_hook("moejax", "shape_checking.check")

TOY = {
    "vocab_size": 53,
    "hidden_size": 48,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 9,
    "num_experts_per_tok": 5,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_programs_of_long_files() -> Iterator[None]:
    yield
    forget_if_many()


@cache
def _olmoe(options: tuple[tuple[str, Any], ...], seed: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.OlmoeConfig(**TOY | dict(options))
    model = transformers.OlmoeForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def make_olmoe() -> Callable[..., Any]:
    """A function of config options that returns a tiny torch OLMoE in float32, random and far from its init.

    Models are shared between tests: do not change them.
    """

    def make(seed: int = 0, **options: Any) -> Any:
        frozen = {k: tuple(sorted(v.items())) if isinstance(v, dict) else v for k, v in options.items()}
        if frozen == options:
            return _olmoe(tuple(sorted(options.items())), seed)
        return _olmoe.__wrapped__(tuple(options.items()), seed)

    return make


@pytest.fixture(scope="session")
def toy_torch(make_olmoe: Callable[..., Any]) -> Any:
    """The torch OLMoE of default options."""
    return make_olmoe()


@pytest.fixture(scope="session")
def toy_lm(toy_torch: Any) -> Any:
    """The same model, loaded."""
    import moejax

    return moejax.load(toy_torch)


@pytest.fixture(scope="session")
def toy_config() -> dict[str, Any]:
    """A Hugging Face config of the toy sizes."""
    return {"model_type": "olmoe", **TOY}


@pytest.fixture(scope="session")
def toy_tokens() -> np.ndarray:
    """Token ids ``[B T]`` for the toy models; no special token among them."""
    return np.random.default_rng(0).integers(2, TOY["vocab_size"], (3, 7))


@pytest.fixture(scope="session")
def torch_logits() -> Callable[..., np.ndarray]:
    """A function (torch model, tokens, valid) that returns the logits of ``transformers``."""

    def logits(model: Any, tokens: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        import torch

        valid = np.ones_like(tokens) if valid is None else valid
        mask = torch.tensor(valid.astype(np.int64))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(torch.tensor(tokens), attention_mask=mask, position_ids=positions)
        return out.logits.float().numpy()

    return logits
