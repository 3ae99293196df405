"""Mutated configs of every family, and what became of each: it fits the weights, or one line says what is wrong."""

import copy
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tiny.hugging_face import CONFIGS, fields

from moejax import MoejaxError
from moejax.checkpoints.plan import layouts, leaf_paths, make_plan
from moejax.checkpoints.safetensors import Entry
from moejax.hugging_face import declared_fields
from moejax.models import Decoder, family

LONGEST = 1200
"""The most characters of a message."""

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e-5, 1e300, float("inf"), float("nan"), 10**30, 2**24, 2**31),
    *("", "1", "1e-5", "false", "silu", "gelu", "nonsense", "full_attention", "x" * 3000, "\x1b]0;owned\x07\u202e"),
    *([], [1], [0, 1], ["a"], [None], [[[]]], [1.5, 2.5], ["full_attention"] * 4, ["sliding_attention"] * 4),
    *({}, {"a": 1}, {"rope_type": "yarn"}, {"quant_method": "awq"}, {"rope_type": ["linear"], "factor": {}}),
]
NAMES = [
    "a_note",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_theta",
    "quantization_config",
    "layer_types",
    "sliding_window",
    "original_max_position_embeddings",
    "x" * 5000,
    "\x1b[2J\u202e",
    "",
]
ROPES = ["default", "linear", "dynamic", "llama3", "longrope", "yarn"]
ROPE_KEYS = {
    "rope_type": "linear",
    "type": "linear",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 7,
    "long_factor": [2.0] * 7,
    "attention_factor": 1.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "truncate": True,
    "partial_rotary_factor": 1.0,
    "full_attention": {"rope_type": "default"},
}

_MOEJAX: dict[str, Any] = {
    "model_type": "moejax",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe": "smoe",
    "moe_args": {"expert_bias": True},
    "moe_layers": [1, 2],
    "pad_token_id": 0,
}

FAMILIES = sorted([*CONFIGS, "moejax"])


def base(name: str) -> dict[str, Any]:
    """The fields of a family's tiny config."""
    return copy.deepcopy(_MOEJAX if name == "moejax" else fields(name))


@cache
def entries(name: str) -> dict[str, Entry]:
    """The tensors of a family's tiny model."""
    kind = family(name)
    found = {}
    for path, leaf in leaf_paths(Decoder.abstract(kind.config(base(name)))):
        for key, shape in layouts(kind.keys, path, leaf.shape)[-1].tensors:
            found[key] = Entry(shape, np.dtype(np.float32))
    return found


def mutated(rng: random.Random) -> dict[str, Any]:
    """A config with one to three changes; now and then within an object of it."""
    config = base(rng.choice(FAMILIES))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.3:
            _change_positions(config, rng)
        else:
            _change_field(config, rng)
    return config


def _change_field(config: dict[str, Any], rng: random.Random) -> None:
    declared = [] if config.get("model_type") not in FAMILIES else list(declared_fields(config["model_type"]) or ())
    name = rng.choice([*config, *config, *declared, *NAMES])
    kind = rng.random()
    if kind < 0.1:
        config.pop(name, None)
    elif kind < 0.3 and isinstance(config.get(name), int | float):
        value = config[name]
        config[name] = rng.choice([value + 1, 2 * value, -value, str(value), float(value), [value], value * 500])
    else:
        config[name] = copy.deepcopy(rng.choice(VALUES))


def _change_positions(config: dict[str, Any], rng: random.Random) -> None:
    positions = config.get("rope_parameters")
    if not isinstance(positions, dict) or rng.random() < 0.3:
        chosen = rng.sample(list(ROPE_KEYS), rng.randint(0, 8))
        positions = config["rope_parameters"] = {"rope_type": rng.choice(ROPES)} | {k: ROPE_KEYS[k] for k in chosen}
    name = rng.choice(list(ROPE_KEYS))
    positions[name] = copy.deepcopy(rng.choice([ROPE_KEYS[name], ROPE_KEYS[name], *VALUES]))


def outcome(config: dict[str, Any]) -> str:
    """What becomes of a config beside the weights of its family's tiny model.

    Raises:
        AssertionError: a message is not one line of bounded length without control characters.
        Exception: anything else than a ``MoejaxError``, which is a fault.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            kind = family(config.get("model_type"))
            read = kind.config(config)
            make_plan(Decoder.abstract(read), kind, entries(kind.model_type))
            found = "loads as before" if read == kind.config(base(kind.model_type)) else "loads as another model"
        except MoejaxError as error:
            check_message(str(error))
            found = f"refused by a {type(error).__name__}"
    for warning in said:
        check_message(str(warning.message))
    return found


def check_message(text: str) -> None:
    """Assert that a message is one line of bounded length, without control characters."""
    assert text.isprintable(), repr(text)
    assert len(text) <= LONGEST


def outcomes(seed: int, count: int) -> Counter[str]:
    """Count what became of so many mutated configs; a fault names the config."""
    rng, found = random.Random(seed), Counter[str]()
    for config in mutations(rng, count):
        try:
            found[outcome(config)] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}: {config!r:.2000}") from error
    return found


def mutations(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Several configs."""
    return (mutated(rng) for _ in range(count))


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * 4096
