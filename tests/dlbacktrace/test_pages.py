"""What DLBacktrace's pages on its sampler, on temperature and on its pipeline call, batches included."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlbacktrace.engines import PROMPT, STEPS, assert_close, engine, run, tokenizer
from moejax import MoejaxError, PromptError
from moejax.dlbacktrace import DLBAutoSampler
from moejax.dlbacktrace.settings import BacktraceSettings

SHORT = PROMPT[:5]
BATCHES = {
    "left": ([PROMPT, [0, 0, *SHORT]], [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]),
    "right": ([PROMPT, [*SHORT, 0, 0]], [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]),
}
TEMPERATURES = [0.5, 1.0, 2.0]


@pytest.fixture(scope="module")
def sampler() -> DLBAutoSampler:
    return DLBAutoSampler(dlb=engine("olmoe"), tokenizer=tokenizer())


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return [run(prompt=[row]) for row in (PROMPT, SHORT)]


# ---- the sampler ---------------------------------------------------------------------------------------------------


def test_what_generate_returns(sampler: DLBAutoSampler, results: dict[str, Any]) -> None:
    ids = torch.tensor([PROMPT])
    plain = sampler.generate(input_ids=ids, max_new_tokens=STEPS, temperature=None, top_k=None, top_p=None)
    np.testing.assert_array_equal(plain, results["generated_ids"])
    again, scores = sampler.generate(ids, max_new_tokens=STEPS, return_scores=True, output_attentions=False)
    np.testing.assert_array_equal(again, plain)
    assert [score.argmax() for score in scores] == plain[0, -STEPS:].tolist()
    _, info = sampler.generate(ids, max_new_tokens=STEPS, dlb_tokens_count=1, return_relevance=True)
    (entry,) = info["relevance_trace"]
    for name, value in results["relevance_trace"][0]["all_wt"].items():
        assert_close(entry["all_wt"][name], value, name)
    with pytest.raises(TypeError, match="output_attentions: use return_layerwise_output"):
        sampler.generate(ids, output_attentions=True)
    with pytest.raises(TypeError, match="dlb_tokens_count is explain_tokens"):
        sampler.generate(ids, dlb_tokens_count=1, explain_tokens=2)


def test_a_temperature_draws_and_is_used(sampler: DLBAutoSampler, results: dict[str, Any]) -> None:
    """At every temperature but 1 tokens are drawn; what they are drawn from are the logits over it."""
    options = {"input_ids": [PROMPT], "max_new_tokens": 1, "return_scores": True}
    (logits,) = sampler.generate(**options)[1]
    for temperature in (0.5, 2.0):
        (scores,) = sampler.generate(**options, temperature=temperature, seed=1)[1]
        np.testing.assert_allclose(scores, logits / temperature, rtol=1e-5, atol=1e-5)
    # no limit is added that was not asked for
    (scores,) = sampler.generate(**options, do_sample=True)[1]
    assert np.isfinite(scores).all()
    (scores,) = sampler.generate(**options, temperature=0.8, top_k=4)[1]
    assert np.isfinite(scores).sum() == 4
    drawn = [
        sampler.generate([PROMPT], max_new_tokens=4, temperature=9.0, seed=seed)[0, 7:].tolist() for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_annealing_feeds_its_answer_back(sampler: DLBAutoSampler) -> None:
    generated: Any = torch.tensor([PROMPT])
    for temperature in (1.5, 0.5):
        generated = sampler.generate(input_ids=generated, max_new_tokens=1, temperature=temperature, seed=3)
    assert generated.shape == (1, len(PROMPT) + 2)
    assert generated[0, : len(PROMPT)].tolist() == PROMPT


def test_lengths_may_count_the_prompt(sampler: DLBAutoSampler) -> None:
    assert sampler.generate([PROMPT], max_length=len(PROMPT) + STEPS).shape == (1, len(PROMPT) + STEPS)

    def lengths(**options: Any) -> tuple[Any, Any]:
        lm = engine("olmoe").model
        assert lm is not None
        found = BacktraceSettings.from_options(options, None).for_generation(lm, 1.0, longest=7)
        return found["max_new_tokens"], found.get("min_new_tokens")

    assert lengths(max_length=9, min_length=8) == (2, 1)
    assert lengths(max_length=9, max_new_tokens=1, min_length=3) == (1, 0)
    assert lengths(max_new_tokens=20, min_new_tokens=4, min_length=9) == (20, 4)
    assert lengths() == (50, None)
    with pytest.raises(PromptError, match="a prompt of 7 tokens leaves no room in max_length=7"):
        sampler.generate([PROMPT], max_length=7)
    with pytest.raises(MoejaxError, match="do_sample=False takes the best token"):
        sampler.generate([PROMPT], do_sample=False, temperature=0.5)
    for options in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"num_beams": 0}):
        with pytest.raises(MoejaxError):
            sampler.generate([PROMPT], **options)
    with pytest.raises(MoejaxError, match=r"num_beams=3 is a search, temperature=0.7 a draw"):
        sampler.generate([PROMPT], num_beams=3, temperature=0.7)


@pytest.mark.slow
def test_beams_are_explained_as_they_are_returned() -> None:
    """The trace is that of the answer, whatever the search did on its way."""
    found = run(num_beams=3, num_return_sequences=2, early_stopping=True)
    ids, trace = found["generated_ids"], found["relevance_trace"]
    assert ids.shape == (2, len(PROMPT) + STEPS)
    for step, entry in enumerate(trace):
        np.testing.assert_array_equal(entry["token_id"], ids[:, len(PROMPT) + step])
        assert_close(entry["all_wt"]["decoder_lm_head"][:, -1].max(-1), [100, 100])
    last = engine("olmoe").eval({"decoder_embeddings": ids[1:, :-1]}, predicted_token=ids[1, -1], task="generation")
    for name, value in last.items():
        assert_close(trace[-1]["all_wt"][name][1], value[0], name)


# ---- temperature ---------------------------------------------------------------------------------------------------


def test_predict_divides_the_logits_alone() -> None:
    dlb, ids, mask = engine("olmoe"), torch.tensor([PROMPT]), torch.ones(1, 7)
    found = {t: dlb.predict(ids, mask, temperature=t, debug=False) for t in TEMPERATURES}
    logits = found[1.0]["output"]["output_values"]
    assert logits.shape == (1, 7, 97)
    for t, node_io in found.items():
        assert set(node_io) == {*dlb.layer_stack, "output"}
        np.testing.assert_allclose(node_io["output"]["output_values"], logits / t, rtol=1e-6)
        np.testing.assert_array_equal(node_io["decoder_lm_head"]["output_values"], logits)
    with pytest.raises(MoejaxError, match="temperature=0 must be positive"):
        dlb.predict(ids, temperature=0)


def test_evaluation_explains_the_pass_before(results: dict[str, Any]) -> None:
    dlb = engine("olmoe")
    dlb.predict(results["generated_ids"][:, :-1], temperature=0.7)
    relevance = dlb.evaluation(mode="default", multiplier=100.0, task="generation")
    for name, value in results["relevance_trace"][-1]["all_wt"].items():
        assert_close(relevance[name], value, name)
    dlb.close()
    with pytest.raises(MoejaxError, match="call predict first"):
        dlb.evaluation()


# ---- the pipeline --------------------------------------------------------------------------------------------------


def test_results_have_the_names_of_the_page(results: dict[str, Any]) -> None:
    found = run(task="auto", dlb_tokens_count=2, return_scores=True)
    np.testing.assert_array_equal(found["generated_ids"], results["generated_ids"])
    assert (len(found["relevance_trace"]), len(found["scores_trace"])) == (2, STEPS)
    assert found["relevance"] is found["relevance_trace"][-1]["all_wt"]
    best = run(task="binary-classification", thresholding=1.0)
    assert best["predictions"].argmax() == results["generated_ids"][0, len(PROMPT)]
    assert best["predictions"].shape == (1, 97)


def test_pictures_are_called_as_on_the_page(results: dict[str, Any], tmp_path: Path) -> None:
    dlb, trace = engine("olmoe"), results["relevance_trace"]
    given = {"input_ids": [PROMPT], "tokenizer": tokenizer(), "generated_ids": results["generated_ids"]}
    figure = dlb.visualize_tokenwise_relevance_map(timewise_relevance_out=trace, **given, figsize=(12, 6))
    assert figure.axes[0].images[0].get_array().shape == (len(PROMPT) + STEPS - 1, STEPS)
    dlb.visualize_input_heatmap_for_token(timewise_relevance_out=trace, n=0, **given, figsize=(10, 3))
    dlb.visualize(save_path=tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    dlb.visualize(tmp_path / "graph")
    assert "<svg" in (tmp_path / "graph.svg").read_text()
    with pytest.raises(TypeError, match="trace is missing"):
        dlb.visualize_tokenwise_relevance_map(input_ids=[PROMPT])
    with pytest.raises(TypeError, match="input_ids are missing"):
        dlb.visualize_tokenwise_relevance_map(trace)


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", BATCHES)
def test_each_row_is_explained_as_alone(side: str, alone: list[dict[str, Any]]) -> None:
    ids, mask = map(np.array, BATCHES[side])
    both = engine("olmoe").sample_auto(tokenizer(), ids, mask, max_new_tokens=STEPS, return_relevance=True)
    for row, (single, real) in enumerate(zip(alone, mask.astype(bool), strict=True)):
        answer = single["generated_ids"][0, real.sum() :]
        np.testing.assert_array_equal(both["generated_ids"][row], [*ids[row], *answer])
        for index, (step, expected) in enumerate(zip(both["relevance_trace"], single["relevance_trace"], strict=True)):
            columns = np.append(real, np.ones(index, bool))
            assert step["token_id"][row] == expected["token_id"]
            for kind in ("all_wt", "expert_relevance"):
                for name, value in step[kind].items():
                    want = expected[kind][name]
                    assert_close(value[row, columns], want[0] if kind == "all_wt" else want, name)
                    assert not value[row, ~columns].any()


@pytest.mark.parametrize("side", ["right", pytest.param("left", marks=pytest.mark.slow)])
def test_each_row_is_predicted_and_evaluated_as_alone(side: str) -> None:
    dlb, (ids, mask) = engine("olmoe"), map(np.array, BATCHES[side])
    both, together = dlb.predict(ids, mask, temperature=2.0), dlb.evaluation()
    task = dlb.run_task(task="multi-class-classification", inputs=(ids, mask), thresholding=0.01, return_relevance=True)
    for row, prompt in enumerate((PROMPT, SHORT)):
        real = mask[row].astype(bool)
        single, one = dlb.predict([prompt], temperature=2.0), dlb.evaluation()
        assert_close(both["output"]["output_values"][row, real], single["output"]["output_values"][0], scale=1)
        for name, value in one.items():
            assert_close(together[name][row, real], value[0], name)
        classified = dlb.run_task(
            task="multi-class-classification", inputs=[prompt], thresholding=0.01, return_relevance=True
        )
        for name, value in classified["relevance"].items():
            assert_close(task["relevance"][name][row, real], value[0], name)
