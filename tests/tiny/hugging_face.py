"""Tiny random ``transformers`` models of every family, and their configs.

Sizes differ within a model, so that a swapped axis cannot pass. Weights, biases and norms are random and far from their
initial values, so that a mistake in any of them shows.

The families' sizes are V=97, D=40, L=4, and F, E, K, H, G and C as in :data:`CONFIGS`. The OLMoE of the fixtures
``make_olmoe``, ``toy_torch`` and ``toy_lm`` has V=53, D=48, L=2, F=14, E=9, K=5, H=8, G=4, C=6.
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import LM, load
from moejax.models import Config, Decoder
from tiny.family_configs import CONFIGS

TOY: dict[str, Any] = {
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
"""The OLMoE of the fixtures."""

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


FAMILIES = sorted(CONFIGS)
KINDS = ["afmoe", "deepseek_v3", "gpt_oss", "granitemoeshared", "jetmoe", "olmoe", "qwen2_moe"]
"""Families that together have every piece."""


def every_family(often: list[str] = KINDS) -> list[Any]:
    """All families as parameters of a test; those that are not to be run often are slow."""
    import pytest

    return [pytest.param(name, marks=[] if name in often else [pytest.mark.slow]) for name in FAMILIES]


_WITHOUT_FUSED_EXPERTS = {"granitemoe", "granitemoeshared", "jetmoe", "llama", "mistral", "phi3", "qwen2", "qwen3"}


def fields(family: str, **changes: Any) -> dict[str, Any]:
    """Fields of the family's ``config.json``, with changes."""
    return {"model_type": family, **COMMON, **CONFIGS[family], **changes}


def torch_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model in float32 with eager attention and experts. Callers share it: do not change it."""
    return _torch_model(family, seed, json.dumps(changes, sort_keys=True))


@cache
def _torch_model(family: str, seed: int, changes: str) -> Any:
    return random_model(fields(family, **json.loads(changes)), seed)


def loaded(family: str, seed: int = 0, **changes: Any) -> LM:
    """The model of :func:`torch_model`, loaded by moejax."""
    return load(torch_model(family, seed, **changes))


def olmoe(seed: int = 0, **options: Any) -> Any:
    """An OLMoE of the sizes :data:`TOY` in float32, with options of its config. Callers share it: do not change it."""
    frozen = {k: tuple(sorted(v.items())) if isinstance(v, dict) else v for k, v in options.items()}
    if frozen == options:
        return _olmoe(tuple(sorted(options.items())), seed)
    return _olmoe.__wrapped__(tuple(options.items()), seed)


@cache
def _olmoe(options: tuple[tuple[str, Any], ...], seed: int) -> Any:
    return random_model({"model_type": "olmoe"} | TOY | dict(options), seed, _perturb)


def published(family: str, **changes: Any) -> Any:
    """A model of three layers in bfloat16, as most models are published. The caller may change it."""
    kinds = {name: kind[:3] for name, kind in CONFIGS[family].items() if isinstance(kind, list) and len(kind) == 4}
    return copy.deepcopy(torch_model(family, **kinds | {"num_hidden_layers": 3} | changes)).bfloat16()


def publish(family: str, folder: Path) -> Path:
    """Write the model of :func:`published` into a folder as ``transformers`` does, and return the folder."""
    published(family).save_pretrained(folder)
    return folder


def _replace(name: str, parameter: Any) -> None:
    """Draw a parameter anew; some families leave memory as it was for parameters that they expect to load."""
    import torch

    spread = 0.3 if parameter.ndim == 1 else 0.15
    around = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
    parameter.copy_(around + spread * torch.randn_like(parameter))


def _perturb(name: str, parameter: Any) -> None:
    """Move a parameter away from its initial value."""
    import torch

    parameter += 0.2 * torch.randn_like(parameter)


def random_model(fields: dict[str, Any], seed: int, fill: Callable[[str, Any], None] = _replace) -> Any:
    """A model with eager attention and experts, each of whose parameters ``fill(name, parameter)`` sets."""
    # imported here: a test that needs the sizes alone does not wait for torch
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    if fields["model_type"] not in _WITHOUT_FUSED_EXPERTS:
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():  # buffers too, such as biases of a selection
            fill(name, parameter)
    return model


def with_config(lm: LM, config: Config) -> LM:
    """The same weights under another configuration."""
    tree = jax.tree.structure(Decoder.abstract(config))
    return LM(jax.tree.unflatten(tree, jax.tree.leaves(lm.decoder)))


def random_batch(batch: int = 3, length: int = 43, padding: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[B T]`` of the families' vocabulary, and where they are real.

    The second row is padded on the left. Rows are longer than the models' windows and YaRN's original context.
    """
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (batch, length))
    valid = np.ones_like(tokens, bool)
    valid[1, :padding] = False
    return tokens, valid


def torch_logits(
    model: Any, tokens: np.ndarray, valid: np.ndarray | None = None, positions: bool = False
) -> np.ndarray:
    """Logits ``[B T V]`` of ``transformers``.

    Args:
        positions: give the model positions that count real tokens alone, as moejax counts them; by default the model
            counts positions itself.
    """
    import torch

    mask = torch.ones(tokens.shape, dtype=torch.long) if valid is None else torch.tensor(valid, dtype=torch.long)
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=mask, **given)
    return out.logits.float().numpy()
