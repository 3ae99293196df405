"""Checkpoints that are made byte by byte, so that they can be large at no cost, or wrong in one place."""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    # absent fields have the defaults of transformers' class, whose import takes memory
    "eos_token_id": None,
    "pad_token_id": 1,
}


def olmoe_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an OLMoE as it is published, written out here independently of the key tables."""
    d, f, e = config["hidden_size"], config["intermediate_size"], config["num_experts"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (d,),
            f"{layer}self_attn.q_proj.weight": (d, d),
            f"{layer}self_attn.k_proj.weight": (kv, d),
            f"{layer}self_attn.v_proj.weight": (kv, d),
            f"{layer}self_attn.o_proj.weight": (d, d),
            f"{layer}self_attn.q_norm.weight": (d,),
            f"{layer}self_attn.k_norm.weight": (kv,),
            f"{layer}mlp.gate.weight": (e, d),
        }
        for j in range(e):
            expert = f"{layer}mlp.experts.{j}."
            shapes |= {f"{expert}gate_proj.weight": (f, d), f"{expert}up_proj.weight": (f, d)}
            shapes |= {f"{expert}down_proj.weight": (d, f)}
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}


GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 4096,
    "hidden_size": 2880,
    "intermediate_size": 1440,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": None,
}


def gpt_oss_shapes(config: dict[str, Any], *, packed: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Keys, dtypes and shapes of a GPT-OSS with experts as MXFP4 or in bfloat16."""
    d, f, e, head = (config[n] for n in ("hidden_size", "intermediate_size", "num_local_experts", "head_dim"))
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    plain: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    codes: dict[str, tuple[int, ...]] = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows, width in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            key = f"{layer}self_attn.{name}_proj."
            plain |= {f"{key}weight": (rows, width), f"{key}bias": (rows,)}
        plain |= {f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,)}
        plain |= {f"{layer}self_attn.sinks": (config["num_attention_heads"],)}
        plain |= {f"{layer}mlp.router.weight": (e, d), f"{layer}mlp.router.bias": (e,)}
        for name, rows, width in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            key = f"{layer}mlp.experts.{name}"
            plain[f"{key}_bias"] = (e, rows)
            if packed:
                codes |= {f"{key}_blocks": (e, rows, width // 32, 16), f"{key}_scales": (e, rows, width // 32)}
            else:
                plain[key] = (e, width, rows)
    plain |= {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}
    return {key: ("BF16", shape) for key, shape in plain.items()} | {key: ("U8", s) for key, s in codes.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Return random bfloat16 values for every tensor."""
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for key, shape in shapes.items()}


def header_bytes(header: dict[str, Any] | bytes, length: int | None = None) -> bytes:
    """Return the bytes with which a safetensors file begins; ``length``, if given, is a false length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Write a safetensors file of zeros that takes no room on disk; return the bytes of its data."""
    header, end = {}, 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + {"BF16": 2, "U8": 1}[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    start = header_bytes(header)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + end)
    return end


def write_sparse_shards(folder: Path, config: dict[str, Any]) -> int:
    """Write an OLMoE of zeros, with one shard for each layer and one for the rest; return the bytes of a layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    groups: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for key, shape in olmoe_shapes(config).items():
        layer = key.split(".")[2] if key.startswith("model.layers.") else "rest"
        groups.setdefault(f"model-{layer}.safetensors", {})[key] = ("BF16", shape)
    sizes = {name: write_sparse(folder / name, group) for name, group in groups.items()}
    index = {"weight_map": {key: name for name, group in groups.items() for key in group}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(size for name, size in sizes.items() if "rest" not in name)


def write_model(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = OLMOE) -> Path:
    """Write a folder with one ``model.safetensors`` and a config."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
