"""Tiny random models of every family, as transformers makes and writes them; all sizes are different."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers as tf

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1500.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

FAMILIES = ("olmoe", "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "jetmoe", "llama")


def _config(family: str, **changes: Any) -> tf.PretrainedConfig:
    c, plain = _COMMON | changes, {"rope_type": "default", "rope_theta": 777.0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    wide = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14}
    if family == "olmoe":
        sizes = {"intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2, **heads}
        return tf.OlmoeConfig(**sizes, clip_qkv=0.7, rope_parameters=plain, **c)
    if family == "qwen3_moe":
        sizes = {"intermediate_size": 36, "moe_intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3}
        return tf.Qwen3MoeConfig(**sizes, **wide, norm_topk_prob=True, mlp_only_layers=[1], rope_parameters=plain, **c)
    if family == "qwen2_moe":
        sizes = {"intermediate_size": 36, "moe_intermediate_size": 20, "num_experts": 7, "num_experts_per_tok": 3}
        sizes |= {"shared_expert_intermediate_size": 28, "decoder_sparse_step": 2, **heads}
        return tf.Qwen2MoeConfig(**sizes, rope_parameters=plain, **c)
    if family == "mixtral":
        sizes = {"intermediate_size": 20, "num_local_experts": 6, "num_experts_per_tok": 2, **heads}
        return tf.MixtralConfig(**sizes, sliding_window=5, rope_parameters=plain, **c)
    if family == "gpt_oss":
        sizes = {"intermediate_size": 20, "num_local_experts": 7, "num_experts_per_tok": 3, **wide}
        glu = {"swiglu_limit": 1.1, "swiglu_alpha": 1.5, "sliding_window": 5, "max_position_embeddings": 256}
        return tf.GptOssConfig(**(sizes | glu | {"rope_parameters": _YARN} | c))
    if family == "llama":
        sizes = {"intermediate_size": 36, "attention_bias": True, "mlp_bias": True, **heads}
        return tf.LlamaConfig(**sizes, rope_parameters=plain, **c)
    sizes = {"intermediate_size": 20, "num_key_value_heads": 3, "kv_channels": 14}
    sizes |= {"num_local_experts": 6, "num_experts_per_tok": 2, "rms_norm_eps": 1e-3}
    return tf.JetMoeConfig(**sizes, rope_parameters=plain, **c)


def make(family: str, **changes: Any) -> tf.PreTrainedModel:
    """Make a model with random parameters, also where transformers starts with constants: biases, norms, sinks."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(_config(family, **changes)).eval()
    for parameter in model.parameters():
        # some families do not initialise parameters that they expect to load
        parameter.data = torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0)
    return model.to(torch.bfloat16)


@functools.cache
def _made(family: str) -> tf.PreTrainedModel:
    return make(family)


def write(family: str, folder: Path) -> Path:
    """Write the family's model as transformers publishes it, in bfloat16."""
    _made(family).save_pretrained(folder)
    return folder
