"""Every registered layer in a decoder: explained, intervened on, generated from, stored."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, ROW, V, best_and_worst, noisy
from tiny.tokenizers import word_tokenizer

import moejax
from layers.reference import LIBMOE, PUBLISHED
from moejax import LM, Gates, explain
from moejax.checkpoints import save_folder
from moejax.models import Decoder, family
from moejax.rules import RULES, Rule

CONFIG: dict[str, Any] = {
    "model_type": "moejax", "vocab_size": V, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 3,
    "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip
CASES = [(name, None) for name in PUBLISHED] + [(name, "libmoe") for name in LIBMOE]


def hugging_face(name: str, compat: str | None = None, **args: Any) -> dict[str, Any]:
    groups = {"num_groups": 3, "num_selected_groups": 2} if name == "smoe_sharev3" and not compat else {}
    return CONFIG | {"moe": name, "moe_args": groups | {"compat": compat} | args}


@cache
def make_lm(name: str, compat: str | None = None, bias: bool = False) -> LM:
    """Random weights far from zero, biases and the state of the router among them."""
    fields = hugging_face(name, compat, expert_bias=bias)
    decoder = noisy(family("moejax").config(fields), 3, jnp.float32)
    for layer in decoder.layers:
        if name == "smoe_tcmoe":  # beyond their offset, so that null routes are selected too
            router = layer.feed_forward.router
            router.weight = router.weight.at[12:].multiply(6)
    return LM(decoder, word_tokenizer(), name, fields)


# ---- the ledger ----------------------------------------------------------------------------------------------------

NAMES = ("attnlrp", "attnlrp-uniform", "cplrp", "proportional")
ORDINARY = {
    ("smoe_tcmoe", None, "attnlrp"),
    ("smoe_plus_plus", None, "attnlrp-uniform"),
    ("smoe_sharev3", "libmoe", "cplrp"),
}


@pytest.mark.parametrize(
    ("name", "compat", "rule"),
    [
        pytest.param(*case, rule, marks=() if (*case, rule) in ORDINARY else pytest.mark.slow)
        for case in CASES
        for rule in NAMES
    ],
)
def test_ledger_closes(name, compat, rule):
    check_closed(make_lm(name, compat, bias=True), RULES[rule])


def check_closed(lm: LM, rule: Rule) -> None:
    relevance = explain(lm, PROMPT, target=best_and_worst(lm), rule=rule)
    assert relevance.ledger.target[0] > 1
    residual = float(np.abs(relevance.ledger.residual / relevance.ledger.target).max())
    assert residual <= 1e-5, f"residual {residual:.1e}"
    assert relevance.experts.shape == (1, 2, len(PROMPT), lm.config.num_selected)
    assert np.abs(relevance.experts).max() > 0
    # what carries nothing has no relevance
    routing = _routing(lm.decoder)
    for layer, found in enumerate(routing):
        np.testing.assert_array_equal(relevance.expert_ids[layer], found.ids[0])
        assert not np.asarray(relevance.experts)[0, layer][np.asarray(found.weights[0]) == 0].any()


@jax.jit
def _routing(decoder: Decoder) -> list[Any]:
    return decoder.hidden(ROW).routing()


# ---- interventions -------------------------------------------------------------------------------------------------

some = pytest.mark.parametrize(
    ("name", "compat"),
    [pytest.param(*case, marks=() if case == ("smoe_plus_plus", None) else pytest.mark.slow) for case in CASES],
)


@some
def test_all_experts_off_is_the_feed_forward_part_off(name, compat):
    lm = make_lm(name, compat)
    gates = Gates.ones(lm.config, ROW)
    off = Gates(experts=jnp.zeros_like(gates.experts))
    if gates.shared is not None:
        off = Gates(experts=off.experts, shared=jnp.zeros_like(gates.shared))
    none = Gates(feed_forward=jnp.zeros((2, 1, len(PROMPT))))
    np.testing.assert_allclose(lm(ROW, gates=off), lm(ROW, gates=none), rtol=1e-5, atol=1e-5)
    assert np.abs(lm(ROW, gates=off) - lm(ROW)).max() > 0.1


# ---- generation ----------------------------------------------------------------------------------------------------


@some
def test_greedy_generation_is_that_without_a_cache(name, compat):
    """Two prompts of different lengths, so that one is padded; one pass over each answer decides every step."""
    lm, new = make_lm(name, compat), 5
    prompts = [PROMPT, PROMPT[2:6]]
    if name == "expert_choice":
        assert [len(row) for row in lm.generate_ids(prompts, max_new_tokens=new)] == [new, new]
        return
    for prompt, answer in zip(prompts, lm.generate_ids(prompts, max_new_tokens=new), strict=True):
        row = np.zeros((1, len(PROMPT) + new), int)
        row[0, : len(prompt) + new] = [*prompt, *answer]
        logits = np.asarray(lm(jnp.asarray(row)))[0, len(prompt) - 1 : len(prompt) + new - 1]
        assert logits.argmax(-1).tolist() == answer


# ---- files ---------------------------------------------------------------------------------------------------------


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("name", "compat"), [case if not case[1] else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_stored_and_loaded(name, compat, tmp_path):
    lm = make_lm(name, compat, bias=name in ("smoe", "smoe_share"))
    save_folder(lm.decoder, dict(lm.hugging_face), tmp_path / "files")
    again = moejax.load(tmp_path / "files")
    assert again.config == lm.config
    assert_same(again.decoder, lm.decoder)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("name", ["smoe_plus_plus", pytest.param("remoe", marks=pytest.mark.slow)])
def test_converted(name, tmp_path):
    lm = make_lm(name)
    save_folder(lm.decoder, dict(lm.hugging_face), tmp_path / "files")
    moejax.convert(tmp_path / "files", tmp_path / "orbax")
    assert_same(moejax.load(tmp_path / "orbax").decoder, lm.decoder)


# ---- initial weights -----------------------------------------------------------------------------------------------


def test_layers_draw_their_own_weights_from_one_key():
    config = family("moejax").config(hugging_face("smoe"))
    decoder, again = (jax.jit(lambda key: Decoder.init(config, key))(jax.random.key(seed)) for seed in (4, 4))
    one, two = (layer.feed_forward for layer in decoder.layers)
    assert_same(decoder, again)
    assert not np.array_equal(one.gate_weight, two.gate_weight)
    assert not np.array_equal(one.experts.down, two.experts.down)
    assert not np.array_equal(one.experts.down[0], one.experts.down[1])
    assert abs(np.corrcoef(one.gate_weight.ravel(), two.gate_weight.ravel())[0, 1]) < 0.3


@cache
def coupled_lm(name: str, factor: float | None) -> LM:
    """A model whose sequences compete, by a limit on what an expert takes if there is a ``factor``."""
    args = {} if factor is None else {"capacity_factor": factor}
    return LM(noisy(family("moejax").config(hugging_face(name, **args)), 3, jnp.float32))


coupled = pytest.mark.parametrize(("name", "factor"), [("expert_choice", None), ("smoe", 0.7)])


@coupled
def test_interventions_are_apart(name: str, factor: float | None) -> None:
    """Many at a time change the target as each does by itself, though sequences of a batch change each other."""
    lm = coupled_lm(name, factor)
    together = lm(np.stack([PROMPT, PROMPT[::-1]]))[0]
    assert np.abs(together - lm(ROW)[0]).max() > 1e-3
    intact = lm(ROW)[0, -1]
    best, worst = int(intact.argmax()), int(intact.argmin())
    cells = [moejax.Cell.head(1, head) for head in range(4)] + [moejax.Cell.expert(0, e, token=2) for e in range(3)]
    ones = Gates.ones(lm.config, ROW)
    gates = [ones.drop_head(1, head) for head in range(4)] + [ones.drop_expert(0, e, token=2) for e in range(3)]
    changed = [intact - lm(ROW, gates=each)[0, -1] for each in gates]
    want = [float(c[best] - c[worst]) for c in changed]
    found = moejax.ablate(lm, PROMPT, target=moejax.Contrast(best, worst), cells=cells)[:, 0]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@coupled
@pytest.mark.parametrize("over", ["embeddings", "heads"])
def test_steps_of_a_path_are_apart(name: str, factor: float | None, over: str) -> None:
    lm = coupled_lm(name, factor)
    ask = partial(moejax.baselines.integrated_gradients, lm, PROMPT, target=best_and_worst(lm), steps=4, over=over)
    one, many = ask(chunk=1), ask()
    found, want = (x.tokens if over == "embeddings" else x.heads for x in (many, one))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@coupled
def test_prompts_are_explained_apart(name: str, factor: float | None) -> None:
    lm = coupled_lm(name, factor)
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1]]
    for found, prompt in zip(moejax.explain_batch(lm, prompts), prompts, strict=True):
        want = explain(lm, prompt)
        np.testing.assert_allclose(found.tokens, want.tokens, rtol=0, atol=1e-5 * np.abs(want.tokens).max())
        # nor are they padded to a common length, since padding competes too
        np.testing.assert_allclose(want.ledger.target, lm([prompt])[0, -1].max(), rtol=1e-5)


@coupled
def test_a_prompt_is_continued_as_it_is(name: str, factor: float | None) -> None:
    """Without padding, which would compete with it; so is what ``Backtrace`` runs."""
    lm = coupled_lm(name, factor)
    best = [int(lm([prompt])[0, -1].argmax()) for prompt in (PROMPT, PROMPT[:3])]
    assert [lm.generate_ids([prompt], max_new_tokens=1)[0] for prompt in (PROMPT, PROMPT[:3])] == [[b] for b in best]
    run = moejax.Backtrace(model=lm).run_task
    (scores,) = run(task="multi-class classification", inputs=[PROMPT], return_scores=True)["scores_trace"]
    np.testing.assert_allclose(scores, lm(ROW)[:, -1], rtol=1e-5, atol=1e-5)
