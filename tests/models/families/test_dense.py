"""A model without experts: what there is of it is read, shown and switched off; what there is not is said."""

import copy
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny.hugging_face import loaded, random_batch, torch_model

import moejax
from moejax import report
from moejax.checkpoints.doctor import examine
from moejax.checkpoints.verify import verify
from moejax.models import Config, family
from moejax.relevance import BASELINES, ablate
from moejax.relevance.ablate import Cell
from moejax.report.aggregate import top_experts
from moejax.report.checkpoints import doctor_tables
from moejax.rules import Gates
from moejax.training import LossWeights, language_model_loss

L, T, H, D, F, V = 4, 11, 4, 40, 36, 97
PROMPT = random_batch()[0][0, :T]


def published(**changes: object) -> dict[str, object]:
    return torch_model("llama").config.to_dict() | changes


def read(**changes: object) -> Config:
    return family("llama").config(published(**changes))


def test_config() -> None:
    config = loaded("llama").config
    assert (config.num_experts, config.num_selected, config.expert_dim, config.dense_dim) == (0, 0, 0, F)
    described = moejax.get_model_config(torch_model("llama"))
    assert (described.intermediate_size, described.num_experts, described.num_experts_per_tok) == (F, 0, 0)
    defaults = read(num_key_value_heads=None, rms_norm_eps=None, head_dim=None, rope_parameters=None)
    attention = defaults.blocks[0].attention
    assert (attention.num_kv_heads, attention.head_dim) == (H, D // H)
    assert (defaults.norm_eps, defaults.blocks[0].rotary.rope.theta) == (1e-6, 10_000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "'llama3' need 'low_freq"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not one of silu"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(moejax.ConfigError, match=message):
        read(**changes)


@pytest.mark.parametrize("leaf", ["gate_up_bias", "down_bias"])
def test_biases_matter(leaf: str) -> None:
    lm = loaded("llama")
    without = copy.deepcopy(lm.decoder)
    mlp = without.layers[1].feed_forward
    setattr(mlp, leaf, jnp.zeros_like(getattr(mlp, leaf)))
    assert not np.allclose(moejax.LM(without)(PROMPT), lm(PROMPT), atol=1e-2)


def test_relevance_has_no_experts_and_all_else() -> None:
    relevance = moejax.explain(loaded("llama"), PROMPT, target=moejax.Continuation((5, 7)), nodes=["feed_forward.2"])
    shapes = (relevance.tokens.shape, relevance.layers.shape, relevance.heads.shape)
    assert shapes == ((2, T + 1), (2, L + 1, T + 1), (2, L, T + 1, H))
    assert relevance.feed_forward is relevance.attention is relevance.shared is None
    assert relevance.experts.shape == (2, L, T + 1, 0)
    assert relevance.expert_ids.shape == relevance.expert_weights.shape == (L, T + 1, 0)
    assert relevance.by_expert().shape == relevance.by_expert("mean").shape == (2, L, 0)
    assert relevance.drop_renormalise().shape == (2, L, T + 1, 0)
    assert relevance.vectors["feed_forward.2"].shape == (2, T + 1, D)
    with pytest.raises(moejax.PromptError, match=r"there is no node 'neurons\.2' in this model"):
        moejax.explain(loaded("llama"), PROMPT, nodes=["neurons.2"])
    with pytest.raises(moejax.PromptError, match="layer 1 has no router"):
        moejax.explain(loaded("llama"), PROMPT, target=moejax.RouterChoice(1, 0, 2))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_every_view_shows_layers_without_experts(kind: str) -> None:
    """All layers of the one, and one layer of the other, are dense."""
    lm = loaded(kind)
    relevance = moejax.explain(lm, PROMPT)
    found, out = relevance.to_dict(), io.StringIO()
    report.render(found, Console(file=out, width=100))
    assert ("top experts" in out.getvalue()) == (kind != "llama")
    page = report.to_html(found)
    assert '"num_experts":0' in page or kind != "llama"
    drawing = report.figure(found)
    shown = np.asarray(drawing.axes[1].images[0].get_array())
    expected = relevance.heads.sum(2)[0] if kind == "llama" else relevance.by_expert()[0]
    assert np.allclose(shown, expected, atol=1e-5)
    drawing.savefig(io.BytesIO())
    if kind != "llama":
        top = top_experts(found)
        assert top[1] == []
        assert all(top[layer] for layer in (0, 2, 3))


@pytest.mark.slow
def test_heads_and_parts_are_switched_off_and_experts_are_not() -> None:
    lm = loaded("llama")
    gates = Gates.ones(lm.config, PROMPT)
    assert gates.experts is None
    assert np.array_equal(lm(PROMPT, gates=gates), lm(PROMPT))
    without = copy.deepcopy(lm.decoder)
    mlp = without.layers[2].feed_forward
    mlp.down, mlp.down_bias = jnp.zeros_like(mlp.down), jnp.zeros_like(mlp.down_bias)
    gated = lm(PROMPT, gates=gates.drop_feed_forward(2))
    assert np.allclose(gated, moejax.LM(without)(PROMPT), atol=1e-5)
    cells = [Cell.feed_forward(2), Cell.head(1, 3), Cell.token(4)]
    change = ablate(lm, PROMPT, cells=cells, target=moejax.Token(5))
    assert change.shape == (3, 1)
    assert change[0, 0] == pytest.approx(float(lm(PROMPT)[0, -1, 5] - gated[0, -1, 5]), abs=1e-5)
    with pytest.raises(moejax.MoejaxError, match="layer 2 has no experts"):
        ablate(lm, PROMPT, cells=[Cell.expert(2, 0)])
    with pytest.raises(ValueError, match="no 'experts'"):
        gates.drop_expert(2, 0)
    for method in ("integrated-gates", "reap", "frequency", "router-weight", "activation-norm"):
        with pytest.raises(moejax.MoejaxError, match="every layer of this model is dense"):
            BASELINES[method](lm, PROMPT)
    for method in ("rollout", "direct", "integrated-gradients"):
        assert BASELINES[method](lm, PROMPT).feed_forward is None


@pytest.mark.slow
def test_backtrace_tells_of_no_experts() -> None:
    model = moejax.Backtrace(loaded("llama"), model_type="llama")
    assert "dense" in repr(model)
    kinds = {node["class"] for node in model.model_resource["graph"].values()}
    assert "MLP" in kinds
    assert "Mixture_of_Experts" not in kinds
    results = model.run_task(inputs=PROMPT[None], max_new_tokens=2, return_relevance=True)
    assert [entry["expert_relevance"] for entry in results["relevance_trace"]] == [{}, {}]
    assert model.all_layer_expert_relevance == {}
    assert np.isfinite(model.all_wt["decoder_feed_forward_1"]).all()
    assert model.all_wt["decoder_feed_forward_1"].any()


def test_memory_and_doctor() -> None:
    found = examine(torch_model("llama"))
    wide = found["memory"][0]
    size = sum(leaf.size for leaf in jax.tree.leaves(loaded("llama").decoder))
    assert wide["total"] == 4 * size
    assert wide["largest_moe_layer"] == 0
    out = io.StringIO()
    Console(file=out, width=140).print(*doctor_tables(found))
    assert "4 layers, all dense" in out.getvalue()
    assert "experts" not in out.getvalue()


def test_verify_compares_with_transformers(tmp_path: Path) -> None:
    torch_model("llama").save_pretrained(tmp_path / "model")
    result = verify(tmp_path / "model", length=13)
    assert result.passed
    assert result.routing_agreement == ()


def test_loss_is_cross_entropy_alone() -> None:
    decoder, tokens = loaded("llama").decoder, jnp.asarray(random_batch()[0][:, :T])
    total, parts = language_model_loss(decoder, tokens, LossWeights())
    logits = np.asarray(decoder(tokens[:, :-1]), np.float64)
    picked = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    assert float(total) == pytest.approx((np.log(np.exp(logits).sum(-1)) - picked).mean(), rel=1e-5)
    assert float(total) == float(parts["cross_entropy"])
    assert "load" not in parts
