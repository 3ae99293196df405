"""Writing by the key tables is the inverse of reading by them, for every architecture."""

import doctest
from collections.abc import Mapping
from types import ModuleType

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax.checkpoints import load_decoder, to_tensors
from moejax.checkpoints.safetensors import Entry
from moejax.models import Decoder, family, hf_config, keys


class InMemory:
    """Tensors in a dict, as a source to load from."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.entries = {k: Entry(v.shape, v.dtype) for k, v in tensors.items()}

    def read(self, key: str) -> np.ndarray:
        return self.tensors[key]


@st.composite
def configs(draw: st.DrawFn) -> dict:
    size = st.integers(1, 5)
    kv_heads, groups, half_width = draw(size), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    experts = draw(size)
    return {
        "model_type": "olmoe",
        "vocab_size": draw(size),
        "hidden_size": kv_heads * groups * half_width * 2,
        "intermediate_size": draw(size),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
    }


def counting_decoder(config: dict, dtype: np.dtype) -> Decoder:
    """All numbers in all leaves differ; if ``dtype`` has only 16 bits, they repeat after 2039 numbers."""
    leaves, tree = jax.tree.flatten(Decoder.abstract(family("olmoe").config(config)))
    total = sum(leaf.size for leaf in leaves)
    numbers = np.arange(total) % (2039 if dtype.itemsize == 2 else total)
    values = np.split(numbers.astype(dtype), np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(tree, [v.reshape(leaf.shape) for v, leaf in zip(values, leaves, strict=True)])


def fused(tensors: dict[str, np.ndarray], config: dict) -> dict[str, np.ndarray]:
    """The experts' tensors as transformers holds them in memory: stacked, the gate's rows above the linear branch's."""
    out = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."

        def part(e, name, prefix=prefix):
            return tensors[f"{prefix}{e}.{name}_proj.weight"]

        experts = range(config["num_experts"])
        out[prefix + "gate_up_proj"] = np.stack([np.concatenate([part(e, "gate"), part(e, "up")]) for e in experts])
        out[prefix + "down_proj"] = np.stack([part(e, "down") for e in experts])
    return out


relaxed = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(config=configs(), dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]), fuse=st.booleans())
def test_loading_undoes_exporting(config: dict, dtype: type, fuse: bool) -> None:
    decoder = counting_decoder(config, np.dtype(dtype))
    tensors = to_tensors(decoder)
    loaded = load_decoder(config, InMemory(fused(tensors, config) if fuse else tensors))
    assert jax.tree.structure(loaded) == jax.tree.structure(decoder)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(decoder), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), want)


@relaxed
@given(config=configs())
def test_every_number_is_exported_once(config: dict) -> None:
    tensors = to_tensors(counting_decoder(config, np.dtype(np.float32)))
    exported = np.sort(np.concatenate([t.ravel() for t in tensors.values()]))
    np.testing.assert_array_equal(exported, np.arange(len(exported)))


@pytest.mark.parametrize("module", [hf_config, keys], ids=lambda module: module.__name__)
def test_examples_of_docstrings(module: ModuleType) -> None:
    """The worked examples of key tables and config fields say what the code does."""
    result = doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.attempted >= 5
    assert result.failed == 0
