"""Fields of the wrong type, range or meaning are refused in a line that names them, before weights are read."""

import inspect
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny.compare import relative_rms
from tiny.hugging_face import VOCABULARY, loaded, torch_logits, torch_model

import moejax
from faults.mutations import FAMILIES, base, check_message, entries
from moejax import CheckpointError, ConfigError, MoejaxError
from moejax.checkpoints.folder import BUNDLED
from moejax.checkpoints.plan import make_plan
from moejax.checkpoints.safetensors import SafetensorsFile
from moejax.models import Config, Decoder, Fields, family
from moejax.models.object_fields import ObjectFields

JUNK: list[Any] = [True, -1, -0.5, 1.5, 1e300, float("nan"), float("inf"), "1", "nonsense", "x" * 3000, [], ["a"], {}]

FLAGS = ["attention_bias", "norm_topk_prob", "tie_word_embeddings", "qkv_bias", "mlp_bias", "gated"]
NUMBERS = ["rms_norm_eps", "clip_qkv", "swiglu_limit", "swiglu_alpha", "rope_theta"]
SIZES = ["num_attention_heads", "num_key_value_heads", "num_experts", "hidden_size", "decoder_sparse_step", "head_dim"]
LISTS = ["mlp_only_layers", "layer_types", "moe_layers"]
_LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
READ_BY: dict[str, list[str]] = {
    "num_key_value_heads": [name for name in FAMILIES if name not in _LATENT],
    "norm_topk_prob": ["olmoe", "qwen2_moe", "qwen3_moe"],
    "attention_bias": ["olmoe", "qwen3_moe", "llama", "gpt_oss", "moejax"],
    "qkv_bias": ["qwen2_moe"],
    "mlp_bias": ["llama"],
    "gated": ["moejax"],
    "clip_qkv": ["olmoe"],
    "swiglu_limit": ["gpt_oss"],
    "swiglu_alpha": ["gpt_oss"],
    "num_experts": ["olmoe", "qwen2_moe", "qwen3_moe", "moejax"],
    "decoder_sparse_step": ["qwen2_moe", "qwen3_moe"],
    "mlp_only_layers": ["qwen2_moe", "qwen3_moe"],
    "layer_types": ["gpt_oss", "qwen2_moe", "qwen3_moe"],
    "moe_layers": ["moejax"],
    "num_attention_heads": ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "llama", "moejax"],
    "head_dim": ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "llama", "moejax"],
}


def read(name: str, **changes: Any) -> Config:
    return family(name).config(base(name) | changes)


def refused(name: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as error:
        read(name, **{field: value})
    check_message(str(error.value))


def wrong_values(field: str) -> list[Any]:
    if field in FLAGS:
        return [value for value in JUNK if value is not True] + [0, 1]
    if field in NUMBERS:
        return [v for v in JUNK if not (field != "rms_norm_eps" and v == 1.5)] + [0]
    if field in SIZES:
        return [*JUNK, 0, 10**30]
    return [value for value in JUNK if value != []] + [1, [-1], [1.5]]


@pytest.mark.parametrize("field", [*FLAGS, *NUMBERS, *SIZES, *LISTS, "hidden_act", "eos_token_id", "pad_token_id"])
def test_every_family_refuses_a_field_of_another_kind(field: str) -> None:
    for name in READ_BY.get(field, FAMILIES):
        here = "activation_function" if (name, field) == ("jetmoe", "hidden_act") else field
        if field.endswith("token_id"):
            values = [True, 1.5, "3", ["a"], [[1]], -2, 2**31, {}]
        else:
            values = JUNK if field == "hidden_act" else wrong_values(field)
        for value in values:
            refused(name, here, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_type": "yarn"}, "'yarn' need 'factor'"),
        ({"rope_type": "yarn", "factor": 0}, "factor=0 of rotary positions of type 'yarn'"),
        ({"rope_type": "linear", "factor": "x"}, "factor='x' of rotary"),
        ({"rope_type": ["linear"]}, "rope_type="),
        ({"rope_type": "default", "rope_theta": 1}, "rope_theta=1 of rotary"),
        ({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}, "high_freq_factor=4"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 7}, "short_factor.*1 numbers, not 7"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 7, "long_factor": [0.0] * 7}, "long_factor="),
        ({"rope_type": "yarn", "factor": 2, "truncate": "no"}, "truncate='no'"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention="),
        (7, "rope_parameters=7"),
        ("default", "rope_parameters='default'"),
    ],
)
def test_keys_of_rotary_positions_have_kinds_too(change: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read("llama", rope_parameters=change)


def test_keys_that_transformers_ignores_there_are_named_once() -> None:
    plain = read("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.warns(UserWarning, match="type 'default' have keys that change nothing and are kept: a_note, factor"):
        noted = read("llama", rope_parameters={"rope_type": "default", "rope_theta": 500, "factor": 3, "a_note": 1})
    assert noted == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": None, "rope_theta": 77.0},
        {"rope_parameters": {}, "rope_theta": 77.0},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_defaults_of_rotary_positions_are_those_of_transformers(changes: dict[str, Any]) -> None:
    import transformers

    for name in ("gpt_oss", "llama"):
        theirs = transformers.AutoConfig.for_model(**base(name) | json.loads(json.dumps(changes)))
        assert read(name, **changes) == family(name).config(theirs.to_dict())


def test_a_declared_field_that_is_off_counts_where_the_default_is_on() -> None:
    fields = Fields({"model_type": "qwen2_moe", "qkv_bias": False})
    with pytest.raises(ConfigError, match="qkv_bias=False"):
        fields.finish()


def test_no_field_is_read_without_its_kind() -> None:
    assert list(inspect.signature(ObjectFields.__call__).parameters)[:3] == ["self", "name", "kind"]
    assert inspect.signature(ObjectFields.__call__).parameters["kind"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 0.5},
        pytest.param({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 32.0}, marks=pytest.mark.slow),
    ],
    ids=["factor below 1", "ramp the wrong way round"],
)
def test_odd_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (1, 20))
    changes = {"rope_parameters": rope | {"rope_theta": 300.0, "original_max_position_embeddings": 64}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_logits(torch_model("llama", **changes), tokens)
        assert relative_rms(np.asarray(loaded("llama", **changes)(tokens)), theirs) <= 1e-5


class TestCost:
    """What a config or a header claims costs little until it is refused."""

    @pytest.mark.parametrize("name", FAMILIES)
    def test_layers_that_the_weights_lack(self, name: str) -> None:
        layers = 400
        kinds = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}
        changes = {field: [kind] * layers for field, kind in kinds.items() if field in base(name)}
        config = read(name, num_hidden_layers=layers, **changes)
        begun = time.process_time()
        with pytest.raises(CheckpointError, match=f"num_hidden_layers={layers}, but there is no tensor of layer 4"):
            make_plan(Decoder.abstract(config), family(name), entries(name))
        assert time.process_time() - begun < 5

    def test_more_layers_than_any_model(self) -> None:
        with pytest.raises(ConfigError, match="num_hidden_layers=2000 is not an integer from 1 to 1000"):
            read("olmoe", num_hidden_layers=2000)

    def test_experts_that_the_weights_lack(self) -> None:
        begun = time.process_time()
        with pytest.raises(CheckpointError, match="and at least 9992 more"):
            make_plan(Decoder.abstract(read("olmoe", num_experts=100_000)), family("olmoe"), entries("olmoe"))
        assert time.process_time() - begun < 5

    @pytest.mark.parametrize("what", ["tensors", "lists"])
    def test_headers_of_many_values(self, tmp_path: Path, what: str) -> None:
        tensor = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        many = [b'"k%d":%s' % (i, tensor) for i in range(250_000)] if what == "tensors" else [b'"a":[' + b"[]," * 10**6]
        header = b"{" + b",".join(many) + b"}"
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        begun = time.process_time()
        with pytest.raises(CheckpointError, match="more than 1500000 values"):
            SafetensorsFile(path)
        assert time.process_time() - begun < 1


@pytest.mark.parametrize("source", [None, 123, b"x", [], object(), "a\0b", "x" * 5000, "a\nb", Path("a\0b")])
def test_what_is_no_source_is_refused_in_a_line(source: Any) -> None:
    with pytest.raises(MoejaxError) as error:
        moejax.load(source)
    check_message(str(error.value))


@pytest.mark.parametrize("destination", ["a\0b", "x" * 300, "a\nb\0"])
def test_what_is_no_destination_is_refused_in_a_line(tmp_path: Path, destination: str) -> None:
    for write in (moejax.convert, moejax.export):
        with pytest.raises((MoejaxError, OSError)) as error:
            write(BUNDLED / "tiny-olmoe", tmp_path / destination)
        if isinstance(error.value, MoejaxError):
            check_message(str(error.value))
        else:
            assert "\n" not in str(error.value)
