"""Tiny random transformers models of every family, all sizes different, with weights that let mistakes show."""

import json
from functools import cache
from typing import Any

import jax
import numpy as np
import torch
import transformers

from moejax import LM, load
from moejax.models import Config, Decoder

VOCABULARY = 97
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1500.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "clip_qkv": 0.7,
        "rope_parameters": _rope(777.0),
    },
    "qwen3_moe": {
        "intermediate_size": 36,
        "moe_intermediate_size": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "rope_parameters": _rope(5e3),
    },
    "qwen2_moe": {
        "intermediate_size": 36,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
        "rope_parameters": _rope(5e3),
    },
    "mixtral": {
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "rope_parameters": _rope(5e3),
    },
    "gpt_oss": {
        "intermediate_size": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "swiglu_limit": 1.1,
        "swiglu_alpha": 1.5,
        "max_position_embeddings": 256,
        "rope_parameters": _YARN,
    },
    "jetmoe": {
        "intermediate_size": 20,
        "num_key_value_heads": 3,
        "kv_channels": 14,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-3,
        "rope_parameters": _rope(5e3),
    },
    "llama": {
        "intermediate_size": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": _rope(5e3),
    },
}
FAMILIES = sorted(CONFIGS)


def torch_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model with eager attention and experts. Not to be changed: callers share it."""
    return _torch_model(family, seed, json.dumps(changes, sort_keys=True))


@cache
def _torch_model(family: str, seed: int, changes: str) -> Any:
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **(_COMMON | CONFIGS[family] | json.loads(changes)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("eager")
    if family not in ("jetmoe", "llama"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.15
            around = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
            parameter.copy_(around + spread * torch.randn_like(parameter))
    return model


def loaded(family: str, seed: int = 0, **changes: Any) -> LM:
    """The same model in moejax."""
    return load(torch_model(family, seed, **changes))


def with_config(lm: LM, config: Config) -> LM:
    """The same weights under another configuration."""
    tree = jax.tree.structure(Decoder.abstract(config))
    return LM(jax.tree.unflatten(tree, jax.tree.leaves(lm.decoder)))


def random_batch(batch: int = 3, length: int = 43, padding: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and where they are real; the second row is padded on the left. Longer than windows and YaRN's context."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (batch, length))
    valid = np.ones_like(tokens, bool)
    valid[1, :padding] = False
    return tokens, valid


def torch_logits(model: Any, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(valid, dtype=torch.long))
    return out.logits.float().numpy()


def relative_rms(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean()))
