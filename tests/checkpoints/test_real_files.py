"""Folders as people have them: what transformers loads is loaded alike, the rest is refused in a line with its mend.

Each is a kind of fault that was seen in public reports of neighbouring projects.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny.compare import relative_rms
from tiny.hugging_face import random_batch, torch_logits, torch_model

import moejax
from moejax import CheckpointError, ConfigError
from moejax.checkpoints.hub import Hub
from moejax.hugging_face import declared_fields
from moejax.models import FAMILIES, Fields, family

TOKENS = random_batch()[0][:, :20]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    torch_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, values: dict[str, Any], name: str = "model.safetensors") -> None:
    save_file(values, folder / name, {"format": "pt"})


def assert_as_transformers(folder: Path, gate: float = 1e-5) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    assert relative_rms(np.asarray(moejax.load(folder)(TOKENS)), torch_logits(theirs, TOKENS)) <= gate


def refused(folder: Any, kind: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as error:
        moejax.load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


_WITHOUT_DEFAULT = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 64, "num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
}
"""Fields that every published model has and for which the class of transformers has no default, or none that works."""


class TestConfig:
    def test_notes_of_tools_are_kept_and_named_once(self, folder: Path, tmp_path: Path) -> None:
        edit(folder, unsloth_fixed=True, unsloth_version="2025.9.7")
        with pytest.warns(UserWarning, match="change nothing in this family and are kept: unsloth_fixed, unsloth_ver"):
            lm = moejax.load(folder)
        with pytest.warns(UserWarning, match="unsloth"):
            moejax.export(lm, tmp_path / "out", progress=False)
        assert json.loads((tmp_path / "out/config.json").read_text())["unsloth_version"] == "2025.9.7"

    def test_a_declared_field_must_have_its_default(self) -> None:
        usual = {"model_type": "mixtral", "hidden_size": 4096, "router_jitter_noise": 0.0, "rms_norm_eps": 1e-5}
        Fields(usual).finish()
        with (
            pytest.warns(UserWarning, match="are kept: mlp_bias"),  # Llama's own, no field of Mixtral
            pytest.raises(ConfigError, match=r"may change the model: router_jitter_noise=0\.1\."),
        ):
            Fields(usual | {"mlp_bias": True, "router_jitter_noise": 0.1}).finish()

    def test_a_family_that_transformers_lacks_is_strict(self) -> None:
        with pytest.raises(ConfigError, match="may change the model: a_note=3"):
            Fields({"model_type": "moejax", "a_note": 3}).finish()

    def test_absent_fields_have_the_defaults_of_the_class(self) -> None:
        for name in FAMILIES:
            if (declared := declared_fields(name)) is None:
                continue
            needed = {"model_type": name} | _WITHOUT_DEFAULT.get(name, {})
            full = {key: value for key, value in declared.items() if key not in ("id2label", "label2id")}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert family(name).config(needed) == family(name).config(full | needed), name

    @pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
    def test_quantised_weights_are_refused_by_name(self, folder: Path, method: str) -> None:
        edit(folder, quantization_config={"quant_method": method, "bits": 4})
        text = refused(folder, ConfigError)
        assert repr(method) in text
        assert "dequantize" in text

    @pytest.mark.parametrize(
        "rope",
        [
            pytest.param({"rope_type": "linear", "factor": 4.0}, marks=pytest.mark.slow),
            {"rope_type": "dynamic", "factor": 3.0},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 12,
            },
            {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
                "long_factor": [2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2],
                "original_max_position_embeddings": 10,
            },
            {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 20.0},
            pytest.param({"rope_type": "default", "a_note": 3}, marks=pytest.mark.slow),
        ],
        ids=lambda rope: rope["rope_type"],
    )
    def test_scaled_positions(self, folder: Path, rope: dict[str, Any]) -> None:
        edit(folder, max_position_embeddings=16, rope_parameters={"rope_theta": 300.0} | rope)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_as_transformers(folder)
            lm = moejax.load(folder)
            relevance = moejax.explain(lm, TOKENS[0, :18])
            short = moejax.explain(lm, TOKENS[0, :9])
        for result in (relevance, short):
            assert np.abs(result.ledger.residual).max() <= 1e-5 * np.abs(result.tokens).sum()
        np.testing.assert_allclose(short.ledger.target, np.asarray(lm(TOKENS[0, :9]))[0, -1].max(), rtol=1e-5)

    def test_what_is_not_known_of_positions_is_refused(self, folder: Path) -> None:
        edit(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 300.0})
        assert "'spiral' are not supported, only default, linear" in refused(folder, ConfigError)
        edit(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 300.0, "factor": 2.0})
        assert "'llama3' need 'low_freq_factor'" in refused(folder, ConfigError)
        edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5})
        assert "partial_rotary_factor=0.5" in refused(folder, ConfigError)


class TestTensors:
    def test_stored_frequencies_are_skipped(self, folder: Path) -> None:
        import torch

        write(folder, tensors(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(7)})
        assert_as_transformers(folder)

    def test_an_equal_head_is_skipped_and_another_one_used(self, folder: Path, tmp_path: Path) -> None:
        values = tensors(folder)
        edit(folder, tie_word_embeddings=True)
        write(folder, values | {HEAD: values[EMBEDDING].clone()})
        assert_as_transformers(folder)
        write(folder, values | {HEAD: values[EMBEDDING] * 1.5})
        with pytest.warns(UserWarning, match=r"lm_head\.weight holds other numbers and is used"):
            assert_as_transformers(folder)
        with pytest.warns(UserWarning, match="other numbers"):
            lm = moejax.load(folder)
        moejax.export(lm, tmp_path / "out", progress=False)
        assert_as_transformers(tmp_path / "out")

    def test_dtypes_may_be_mixed_and_are_written_back(self, folder: Path, tmp_path: Path) -> None:
        import torch

        values = {key: value.bfloat16() if "norm" not in key else value for key, value in tensors(folder).items()}
        values["model.layers.1.self_attn.k_proj.weight"] = values["model.layers.1.self_attn.k_proj.weight"].float()
        write(folder, values)
        lm = moejax.load(folder)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.decoder)} == {"float32"}
        for source, name in ((lm, "memory"), (folder, "files")):
            moejax.export(source, tmp_path / name, progress=False)
            back = load_file(tmp_path / name / "model.safetensors")
            assert back.keys() == values.keys()
            assert all(
                back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in values.items()
            )

    def test_a_leftover_index_is_not_read(self, folder: Path) -> None:
        index = {"weight_map": dict.fromkeys(tensors(folder), "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.warns(UserWarning, match="the one file is read, as transformers does"):
            assert_as_transformers(folder)


class TestFolders:
    POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 49998\n"

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_pointers_of_git_lfs(self, folder: Path, name: str) -> None:
        (folder / name).write_text(self.POINTER)
        if name == "tokenizer.json":
            (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"1": {"content": "x"}}}')
        text = refused(folder, (CheckpointError, ConfigError))  # type: ignore[arg-type]
        assert f"{folder / name}: a pointer of Git LFS" in text
        assert "git lfs pull" in text

    def test_an_adapter(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        text = refused(folder)
        assert "an adapter for 'org/base'" in text
        assert "merge_and_unload" in text
        (folder / "config.json").unlink()
        assert "an adapter for 'org/base'" in refused(folder, ConfigError)

    def test_a_pickle_and_a_gguf(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        assert "only pytorch_model.bin, a pickle" in refused(folder)
        (folder / "model.gguf").write_bytes(b"GGUF")
        assert "only model.gguf" in refused(folder)

    def test_home_and_typos(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder.parent))
        assert moejax.load("~/model").config.num_layers == 4
        assert "did you mean 'model'?" in refused(folder.parent / "modle")
        assert "did you mean 'tiny-olmoe'?" in refused("tiny-olmo")
        assert "a file; give the folder" in refused(folder / "model.safetensors")

    def test_links_inside_and_outside(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "data")
        (folder / "model.safetensors").symlink_to("data")
        assert moejax.load(folder).config.num_layers == 4
        (folder / "model.safetensors").unlink()
        outside = Path(shutil.move(folder / "data", folder.parent / "data"))
        (folder / "model.safetensors").symlink_to(outside)
        assert f"a link out of its folder, to {outside}" in refused(folder)

    def test_export_keeps_every_side_file(self, folder: Path, tmp_path: Path) -> None:
        kept = ["vocab.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json", "README.md", "LICENSE"]
        for name in (*kept, "modeling.py", "optimizer.pt", "training_args.bin"):
            (folder / name).write_text("{}")
        moejax.export(folder, tmp_path / "out", progress=False)
        there = {path.name for path in (tmp_path / "out").iterdir()}
        assert there == {*kept, "generation_config.json", "config.json", "model.safetensors", "moejax.json"}

    @pytest.mark.parametrize("dtype", ["int8", "int32", "float8_e4m3fn", "complex64", "nonsense"])
    def test_only_floats_are_weights(self, folder: Path, dtype: str) -> None:
        assert f"dtype {dtype!r} is none for weights" in refused(folder, ConfigError, dtype=dtype)

    def test_float32_only_where_it_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert moejax.load("tiny-olmoe").decoder.embedding.dtype == "float32"
        monkeypatch.setattr("moejax.checkpoints.dtypes.free_memory", lambda: 1000)
        with pytest.warns(UserWarning, match="the checkpoint's dtype is kept"):
            assert moejax.load("tiny-olmoe").decoder.embedding.dtype == "bfloat16"

    def test_beyond_the_context(self, folder: Path) -> None:
        edit(folder, max_position_embeddings=16)
        lm = moejax.load(folder)
        with pytest.warns(UserWarning, match="20 tokens exceed the context of 16"):
            moejax.explain(lm, TOKENS[0])


class TestHub:
    FILES = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00000-of-00001.safetensors",
        "model-00001-of-00001.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_x.py",
        "metal/model.bin",
        "original/config.json",
        "original/model.safetensors",
        "onnx/model.safetensors",
    )

    def test_what_is_needed_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        calls: list[tuple[list[str], dict[str, Any]]] = []

        def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
            wanted = list(
                filter_repo_objects(self.FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            )
            for file in wanted:
                shards = [f for f in self.FILES if f.startswith("model-")]
                index = {"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}
                (tmp_path / file).write_text(json.dumps(index if "index" in file else {}))
            calls.append((wanted, options))
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        assert Hub("main", "secret", "/cache").download("org/model") == tmp_path
        fetched = [file for wanted, _ in calls for file in wanted]
        assert sorted(fetched) == sorted(self.FILES[:7])  # each once, nothing from folders
        assert all(o == {"revision": "main", "token": "secret", "cache_dir": "/cache"} for _, o in calls)
