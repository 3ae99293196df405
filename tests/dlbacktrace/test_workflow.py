"""All calls in DLBacktrace's document on mixtures of experts, in their order."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny.tokenizers import text

import moejax
from dlbacktrace.engines import FOUR, LAYERS, PROMPT, STEPS, assert_close, small_torch, tokenizer
from moejax import Backtrace, get_model_config

FEED_FORWARD = [f"decoder_feed_forward_{i}_ff_expert" for i in range(LAYERS)]
ATTENTION = [f"decoder_self_attention_{i}_attention_expert" for i in range(LAYERS)]


def mixtures(family: str) -> set[str]:
    """The keys of the experts' relevance; Qwen's second layer is dense, JetMoE has attention experts."""
    return {*(FEED_FORWARD[:1] if family == "qwen3_moe" else FEED_FORWARD), *(ATTENTION if family == "jetmoe" else [])}


# each family takes as long to compile; other tests cover the differences between them
@pytest.mark.parametrize("family", [f if f == "gpt_oss" else pytest.param(f, marks=pytest.mark.slow) for f in FOUR])
def test_every_call_in_order(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, words = small_torch(family), tokenizer()
    bt = Backtrace(model=model, model_type=family, device="cpu")
    tokens = words(text(PROMPT), return_tensors="pt")
    results = bt.run_task(
        task="generation",
        inputs={"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]},
        tokenizer=words,
        max_new_tokens=STEPS,
        return_relevance=True,
        return_scores=True,
        debug=False,
    )
    assert not capsys.readouterr().out
    check_results(family, bt, results)
    answer = words.decode(results["generated_ids"][0], skip_special_tokens=True)
    assert answer.startswith(text(PROMPT))
    check_experts(family, bt)
    check_steps(results)
    check_eval(bt, results)
    config = get_model_config(model)
    assert (config.hidden_size, config.num_hidden_layers) == (40, LAYERS)
    assert (config.num_experts, config.num_experts_per_tok) == (
        (7, 3) if family in ("qwen3_moe", "gpt_oss") else (6, 2)
    )
    check_specialisation(bt)
    if family in ("olmoe", "gpt_oss"):
        check_against_explain(bt, results)


def check_results(family: str, bt: Backtrace, results: dict[str, Any]) -> None:
    ids = results["generated_ids"]
    assert ids.shape == (1, len(PROMPT) + STEPS)
    assert len(results["relevance_trace"]) == len(results["scores_trace"]) == STEPS
    with torch.no_grad():
        model, prompt = small_torch(family), torch.tensor([PROMPT])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, do_sample=False)
    answer = expected[0, len(PROMPT) :].tolist()
    assert ids[0, len(PROMPT) :].tolist() == answer
    assert [scores.argmax(-1).item() for scores in results["scores_trace"]] == answer
    assert [step["token_id"] for step in results["relevance_trace"]] == answer
    assert bt.model_type == family
    assert set(bt.all_layer_expert_relevance) == mixtures(family)


def check_experts(family: str, bt: Backtrace) -> None:
    """The loop over layers: shapes, statistics, the most relevant experts."""
    for name, scores in bt.all_layer_expert_relevance.items():
        count = 7 if family in ("qwen3_moe", "gpt_oss") else 6
        assert scores.shape == (len(PROMPT) + STEPS - 1, count), name
        assert np.min(scores) >= 0
        assert np.min(scores) < np.mean(scores) < np.max(scores)
        top = scores.mean(axis=0).argsort()[-3:]
        by_axes = scores.mean(axis=tuple(range(len(scores.shape) - 1)))
        assert set(top) == set(by_axes.argsort()[-5:][::-1][:3])
        assert by_axes[top[-1]] > 0


def check_steps(results: dict[str, Any]) -> None:
    """The loop over steps: the number of nodes, the relevance of tokens, and the ledger for the rest."""
    assert len(results["relevance_trace"]) == STEPS
    for index, step in enumerate(results["relevance_trace"]):
        all_wt, ledger = step["all_wt"], step["ledger"]
        assert step["step_index"] == index
        assert len(all_wt) == 3 + 6 * LAYERS
        assert len(step["expert_relevance"]) > 0
        relevance = all_wt["decoder_embeddings"]
        assert isinstance(relevance, np.ndarray)
        assert relevance.shape == (1, len(PROMPT) + index, 40)
        scores = np.sum(relevance, axis=-1).flatten()
        biases = sum(leak.sum() for leak in ledger.leaks.values())
        assert set(ledger.leaks) <= {"bias"}
        assert_close(np.sum(scores), 100 - biases)
        assert_close(ledger.residual, 0)
        sums = {name: value.sum() for name, value in all_wt.items()}
        assert_close(sums["decoder_lm_head"], 100)
        for i in range(LAYERS):
            # a residual sum passes its relevance to its branch and to the stream, which the branch's norm reads too
            stream, branch = sums[f"decoder_residual_feed_forward_{i}"], sums[f"decoder_feed_forward_{i}"]
            read, middle = sums[f"decoder_layer_norm_{i}_1"], sums[f"decoder_residual_self_attention_{i}"]
            assert_close(stream - branch + read, middle)


def check_eval(bt: Backtrace, results: dict[str, Any]) -> None:
    """``eval`` on the values of one step gives that step's relevance."""
    all_out, all_in, generated = bt.compute_outputs(input_text=text(PROMPT), tokenizer=tokenizer(), max_length=STEPS)
    assert generated == [results["generated_ids"][0, len(PROMPT) :].tolist()]
    relevance = bt.eval(
        all_in=all_in,
        all_out=all_out,
        mode="default",
        multiplier=100.0,
        scaler=0,
        max_unit=0,
        thresholding=0.5,
        task="generation",
        device="cpu",
    )
    last = results["relevance_trace"][-1]
    for name, expected in last["all_wt"].items():
        assert_close(relevance[name], expected, name)
    for name, expected in last["expert_relevance"].items():
        assert_close(bt.all_layer_expert_relevance[name], expected, name)


def check_specialisation(bt: Backtrace) -> None:
    """The average over layers ranks experts."""
    sums = [scores.sum(axis=tuple(range(len(scores.shape) - 1))) for scores in bt.all_layer_expert_relevance.values()]
    average = np.mean(sums, axis=0)
    top = average.argsort()[-5:][::-1]
    assert len(top) == 5
    assert np.all(np.diff(average[top]) <= 0)


def check_against_explain(bt: Backtrace, results: dict[str, Any]) -> None:
    """The last step equals ``explain`` on its prefix."""
    ids, step = results["generated_ids"][0].tolist(), results["relevance_trace"][-1]
    assert bt.model is not None
    prefix, target = ids[:-1], moejax.Token(ids[-1])
    nodes = ["feed_forward.1", "attention.0", "stream.1"]
    rel = moejax.explain(bt.model, prefix, target=target, rule="proportional", nodes=nodes)
    unit = 100 / rel.ledger.target[0]
    assert_close(step["all_wt"]["decoder_embeddings"].sum(-1), rel.tokens * unit)
    assert_close(step["all_wt"]["decoder_feed_forward_1"], rel.vectors["feed_forward.1"] * unit)
    assert_close(step["all_wt"]["decoder_self_attention_0"], rel.vectors["attention.0"] * unit)
    assert_close(step["all_wt"]["decoder_residual_feed_forward_0"], rel.vectors["stream.1"] * unit)
    for kind, keys in (("feed_forward", FEED_FORWARD), ("attention", ATTENTION)):
        result = getattr(rel, kind)
        for layer, key in enumerate(keys):
            if key in step["expert_relevance"]:
                assert_close(step["expert_relevance"][key], result.by_token()[0, layer] * unit, key)
