"""What a stranger adds from a file of their own works everywhere, and no file of the package is edited for it.

The family has attention of its own (keys and values from a latent, of unequal widths), routing in groups, shared
experts and a dense first layer. It is compared with transformers' DeepSeek-V3, under another name.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import four_devices
from tiny.compare import relative_rms
from tiny.hugging_face import random_model, torch_logits
from tiny.tokenizers import byte_level

from design import outside
from moejax import LM, Argmax, Cell, ConfigError, Gates, ablate, explain, explain_batch, export, load
from moejax.layers import get_moe
from moejax.models import Decoder, family
from moejax.relevance import BASELINES, TARGETS

ROOT = Path(__file__).parents[2]
PROMPT = [5, 17, 3, 80, 42, 9, 61]
TEXT = "a line of text with words in it, and words in a line of it"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The files as a user imports them."""
    with outside.registered():
        yield


def fields(**changes: Any) -> dict[str, Any]:
    from design.outside.latent import tiny

    return tiny(**changes)


@cache
def theirs() -> Any:
    """transformers' model; the bias that chooses experts is random too."""
    import transformers

    class StrangerConfig(transformers.DeepseekV3Config):
        model_type = "stranger_v3"

    class StrangerForCausalLM(transformers.DeepseekV3ForCausalLM):
        config_class = StrangerConfig

    transformers.AutoConfig.register("stranger_v3", StrangerConfig)
    transformers.AutoModelForCausalLM.register(StrangerConfig, StrangerForCausalLM)
    return random_model(fields(), seed=1)


@cache
def ours() -> LM:
    return load(theirs())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers writes it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("latent") / "model"
    tokenizer = byte_level([TEXT])
    model = random_model(fields(vocab_size=tokenizer.get_vocab_size()), seed=2)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def command(*arguments: object) -> Any:
    """What ``moejax ARGUMENTS --json`` prints, in a process that knows the outside files by ``--plugin`` alone."""
    plugins = [option for path in outside.FILES for option in ("--plugin", str(path))]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "moejax", *map(str, arguments), *plugins, "--json"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestFamily:
    def test_logits(self) -> None:
        tokens = np.random.default_rng(0).integers(1, 88, (3, 29))
        valid = np.ones_like(tokens, bool)
        valid[1, :4] = False
        got = np.asarray(ours()(tokens, valid=valid))
        assert relative_rms(got[valid], torch_logits(theirs(), tokens, valid)[valid]) <= 1e-5

    def test_greedy_generation(self) -> None:
        import torch

        prompts = [PROMPT, [4, 8, 15]]
        rows = ours().generate_ids(prompts, max_new_tokens=24)
        for prompt, row in zip(prompts, rows, strict=True):
            with torch.no_grad():
                want = theirs().generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
            assert row == want[0, len(prompt) :].tolist()

    @pytest.mark.parametrize("rule", ["attnlrp", "attnlrp-uniform", "cplrp", "proportional"])
    def test_relevance_is_conserved(self, rule: str) -> None:
        relevance = explain(ours(), PROMPT, rule=rule)
        scale = np.abs(relevance.ledger.target).max()
        assert np.abs(relevance.ledger.residual).max() <= 1e-5 * scale
        assert relevance.tokens.shape == (1, len(PROMPT))
        assert relevance.feed_forward is not None
        assert relevance.heads.shape[1:] == (3, len(PROMPT), 4)

    def test_padding_changes_no_explanation(self) -> None:
        both = explain_batch(ours(), [PROMPT, PROMPT[:3]])
        for prompt, relevance in zip([PROMPT, PROMPT[:3]], both, strict=True):
            np.testing.assert_allclose(relevance.tokens, explain(ours(), prompt).tokens, rtol=1e-4, atol=1e-5)

    def test_switching_off_equals_the_gate(self) -> None:
        lm = ours()
        ones = Gates.ones(lm.config, jnp.asarray([PROMPT]))
        chosen = int(explain(lm, PROMPT).expert_ids[1, -1, 0])
        made = {
            Cell.expert(2, chosen): ones.drop_expert(2, chosen),
            Cell.head(0, 3): ones.drop_head(0, 3),
            Cell.attention(1): ones.drop_attention(1),
            Cell.feed_forward(0): ones.drop_feed_forward(0),
            Cell.token(2): ones.drop_token(2),
        }
        intact = np.asarray(lm(jnp.asarray([PROMPT]), gates=ones))[0, -1]
        best = intact.argmax()
        want = [intact[best] - np.asarray(lm(jnp.asarray([PROMPT]), gates=g))[0, -1, best] for g in made.values()]
        got = ablate(lm, PROMPT, cells=list(made), target=Argmax())[:, 0]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert np.count_nonzero(np.abs(got) > 1e-4) >= 4

    def test_exported_files_are_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        export(load(folder), tmp_path / "out")
        for path in folder.glob("*.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()

    def test_a_field_that_the_file_does_not_know_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="q_lora_rank"):
            family("stranger_v3").config(fields(q_lora_rank=7))

    def test_random_weights_have_the_shapes_of_loaded_ones(self) -> None:
        made = Decoder.init(ours().config, jax.random.key(0))
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, ours().decoder)


class TestCommands:
    """Each in a process of its own."""

    def test_doctor(self, folder: Path) -> None:
        report = command("doctor", folder)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(load(folder).decoder))
        assert str(weights) in json.dumps(report)

    def test_convert(self, folder: Path, tmp_path: Path) -> None:
        command("convert", folder, tmp_path / "converted")
        tokens = np.asarray([PROMPT])
        np.testing.assert_array_equal(load(tmp_path / "converted")(tokens), load(folder)(tokens))

    def test_explain_by_a_rule_and_a_target_of_ones_own(self, folder: Path) -> None:
        report = command("explain", TEXT, "--model", folder, "--rule", "frozen-norm", "--ask", "stream-sum number=7")
        want = explain(load(folder), TEXT, rule="frozen-norm", target=TARGETS["stream-sum"](7))
        np.testing.assert_allclose(report["targets"][0]["tokens"], want.tokens[0], rtol=1e-4, atol=1e-6)

    def test_explain_by_a_baseline_of_ones_own(self, folder: Path) -> None:
        report = command("explain", TEXT, "--model", folder, "--baseline", "embedding-length")
        want = BASELINES["embedding-length"](load(folder), TEXT)
        np.testing.assert_allclose(report["targets"][0]["tokens"], want.tokens[0], rtol=1e-5)


class TestRule:
    def test_norms_no_longer_leak(self) -> None:
        plain, own = (explain(ours(), PROMPT, rule=rule) for rule in ("plain", "frozen-norm"))
        assert "norm" in plain.ledger.leaks
        assert "norm" not in own.ledger.leaks
        assert np.abs(own.ledger.residual).max() <= 1e-5 * np.abs(own.tokens).sum()


class TestTarget:
    def test_value_and_conservation(self) -> None:
        lm = ours()
        relevance = explain(lm, PROMPT, target=TARGETS["stream-sum"](3))
        stream = lm.decoder.hidden(jnp.asarray([PROMPT])).stream
        np.testing.assert_allclose(relevance.ledger.target[0], stream[0, :, 3].sum(), rtol=1e-5, atol=1e-6)
        # The sum over positions cancels; rounding is relative to what was distributed, not to what is left of it.
        assert np.abs(relevance.ledger.residual).max() <= 1e-5 * np.abs(relevance.tokens).sum()


class TestLayer:
    SIZES = (12, 10, 5, 3)

    def test_weights_are_the_squares(self) -> None:
        x = jax.random.normal(jax.random.key(0), (2, 6, self.SIZES[0]))
        usual, own = (get_moe(name)(*self.SIZES, args={"std_gate": 1.0}) for name in ("smoe", "squared"))
        squares = np.asarray(usual.topk_expert(usual.gate(x))[0]) ** 2
        got = own.topk_expert(own.gate(x))[0]
        np.testing.assert_allclose(got, squares / squares.sum(-1, keepdims=True), rtol=1e-5)

    def test_a_decoder_with_it_is_explained(self) -> None:
        made = four_devices.random_decoder(four_devices.hugging_face("moejax", moe="squared"))
        relevance = explain(LM(made), PROMPT)
        assert np.abs(relevance.ledger.residual).max() <= 1e-5 * np.abs(relevance.tokens).sum()
