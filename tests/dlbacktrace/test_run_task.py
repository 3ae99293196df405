"""Options of ``run_task``: batches, cache policies, steps to explain, modes, and refused values."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny.tokenizers import text

from dlbacktrace.engines import FOUR, PROMPT, STEPS, assert_close, engine, run, small_torch
from moejax import Backtrace, ConfigError, MoejaxError, PromptError
from moejax.dlbacktrace import propagation
from moejax.relevance.engine import relevance
from moejax.rules import Proportional

SHORT = PROMPT[:5]
PADDED = {
    "left": ([PROMPT, [0, 0, *SHORT]], [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]),
    "right": ([PROMPT, [*SHORT, 0, 0]], [[1] * 7, [1, 1, 1, 1, 1, 0, 0]]),
    "both": ([PROMPT, [0, *SHORT, 0]], [[1] * 7, [0, 1, 1, 1, 1, 1, 0]]),
}


def assert_same_trace(ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(ours) == len(other)
    for entry, expected in zip(ours, other, strict=True):
        for kind in ("all_wt", "expert_relevance"):
            assert entry[kind].keys() == expected[kind].keys()
            for name, value in expected[kind].items():
                assert_close(entry[kind][name], value, name)


@pytest.mark.slow
def test_padding_changes_nothing() -> None:
    """With a window of 5 over 9 tokens, padding in the middle of a row must not count as tokens."""
    alone = [run("gpt_oss", [row]) for row in (PROMPT, SHORT)]
    for where, (ids, mask) in PADDED.items():
        both = run("gpt_oss", (np.array(ids), np.array(mask)), return_scores=True)
        assert both["generated_ids"][:, :7].tolist() == ids
        assert both["scores_trace"][0].shape == (2, 97)
        real = np.array(mask, bool)
        for row, single in enumerate(alone):
            answer = single["generated_ids"][0, real[row].sum() :]
            np.testing.assert_array_equal(both["generated_ids"][row, 7:], answer, where)
            for index, step in enumerate(both["relevance_trace"]):
                columns = np.append(real[row], np.ones(index, bool))
                expected = single["relevance_trace"][index]
                assert step["token_id"][row] == expected["token_id"]
                for name, value in step["all_wt"].items():
                    assert_close(value[row, columns], expected["all_wt"][name][0], f"{where} {name}")
                    assert not value[row, ~columns].any()
                for name, value in step["expert_relevance"].items():
                    assert_close(value[row, columns], expected["expert_relevance"][name], f"{where} {name}")


@pytest.mark.slow
def test_a_row_that_ended_has_no_relevance() -> None:
    free = run("gpt_oss", PADDED["left"])
    longer, (first, *_) = free["generated_ids"][:, 7:].tolist()
    assert first not in longer
    ended = run("gpt_oss", PADDED["left"], eos_token_id=first, pad_token_id=0)
    assert ended["generated_ids"][:, 7:].tolist() == [longer, [first, 0, 0]]
    last, expected = ended["relevance_trace"][-1], free["relevance_trace"][-1]
    for name, value in last["all_wt"].items():
        assert not value[1].any()
        assert_close(value[0], expected["all_wt"][name][0], name)
    assert_close(last["ledger"].target, [100, 0])


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": jnp.asarray([PROMPT]), "attention_mask": jnp.ones((1, 7))},
        (torch.tensor([PROMPT]), torch.ones(1, 7)),
        np.array(PROMPT),
        [PROMPT],
        text(PROMPT),
        [text(PROMPT)],
    ],
    ids=["jax", "pair", "one row", "list", "text", "texts"],
)
def test_kinds_of_input(inputs: Any, results: dict[str, Any]) -> None:
    result = run(prompt=inputs, return_relevance=False)
    np.testing.assert_array_equal(result["generated_ids"], results["generated_ids"])
    assert set(result) == {"task", "generated_ids"}
    assert engine("olmoe").all_layer_expert_relevance == {}


def test_sample_auto(results: dict[str, Any]) -> None:
    result = engine("olmoe").sample_auto(None, torch.tensor([PROMPT]), torch.ones(1, 7), max_new_tokens=STEPS)
    np.testing.assert_array_equal(result["generated_ids"], results["generated_ids"])


def test_cache_policies(results: dict[str, Any], tmp_path: Path) -> None:
    full, bt = results["relevance_trace"], engine("olmoe")
    for policy in ("summary", "disk", "none"):
        trace = run(relevance_cache_policy=policy, relevance_cache_dir=tmp_path / "cache")["relevance_trace"]
        assert len(trace) == (0 if policy == "none" else STEPS)
        for entry, expected in zip(trace, full, strict=False):
            assert not {"all_wt", "expert_relevance"} & set(entry)
            assert (entry["step_index"], entry["token_id"]) == (expected["step_index"], expected["token_id"])
            for name, value in expected["all_wt"].items():
                assert_close(entry["summary"][name], value.sum((1, 2)), name)
            for name, value in expected["expert_relevance"].items():
                assert_close(entry["summary"][name], value.sum(0), name)
            if policy == "disk":
                assert_same_trace([bt.load_step(entry["path"])], [expected])
                np.load(entry["path"], allow_pickle=False).close()
        # every policy leaves the last step in the attributes
        assert_same_trace([{"all_wt": bt.all_wt, "expert_relevance": bt.all_layer_expert_relevance}], full[-1:])
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == STEPS
    with pytest.raises(MoejaxError, match="not the relevance of a step"):
        bt.load_step(tmp_path / "nothing.npz")


def test_steps_share_a_pass(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps share one pass, or several passes if their vectors need too much memory; the numbers are the same."""
    # 9 tokens are padded to 16
    counted, pairs_only = [], 2 * 16 * 40 * 4 * 13
    monkeypatch.setattr(propagation, "relevance", lambda *a, **k: counted.append(1) or relevance(*a, **k))
    run()
    assert len(counted) == 1
    monkeypatch.setattr(propagation, "CHUNK_BYTES", pairs_only)
    assert_same_trace(run()["relevance_trace"], results["relevance_trace"])
    assert len(counted) == 3


@pytest.mark.parametrize(("which", "steps"), [("none", []), (2, [0, 1]), ({2, 0}, [0, 2]), ([1], [1])])
def test_explain_tokens(which: Any, steps: list[int], results: dict[str, Any]) -> None:
    trace = run(explain_tokens=which)["relevance_trace"]
    assert [entry["step_index"] for entry in trace] == steps
    assert_same_trace(trace, [results["relevance_trace"][i] for i in steps])


def test_layerwise_outputs(results: dict[str, Any]) -> None:
    """Layerwise outputs equal those of transformers at every step, also if no relevance is asked for."""
    trace = run(return_relevance=False, return_layerwise_output=True)["layerwise_output_trace"]
    assert len(trace) == STEPS
    with torch.no_grad():
        output = small_torch("olmoe")(torch.tensor(results["generated_ids"][:, :-1]), output_hidden_states=True)
    for index, step in enumerate(trace):
        columns = len(PROMPT) + index
        first = output.hidden_states[1][:, :columns].numpy()
        assert_close(step["all_out"]["decoder_residual_feed_forward_0"], first, scale=1)
        assert_close(step["all_out"]["decoder_lm_head"], output.logits[:, :columns].numpy(), scale=1)
        assert_close(step["all_in"]["decoder_layer_norm_1_0"], first, scale=1)
        middle, written = (step["all_out"][f"decoder_{n}_0"] for n in ("residual_self_attention", "feed_forward"))
        assert_close(middle + written, first, scale=1)
        assert set(step["all_out"]) == set(engine("olmoe").layer_stack)


def test_mode_multiplier_and_scaler(results: dict[str, Any]) -> None:
    entries = [run(multiplier=-3)["relevance_trace"][-1], run(scaler=7)["relevance_trace"][-1]]
    for name, value in results["relevance_trace"][-1]["all_wt"].items():
        assert_close(entries[0]["all_wt"][name], -0.03 * value, name)
        assert_close(entries[1]["all_wt"][name].sum(), 7, name)
    signed = run(mode="cplrp")["relevance_trace"][-1]
    assert_close(signed["all_wt"]["decoder_lm_head"].sum(), 100)
    assert (signed["all_wt"]["decoder_embeddings"] < 0).any()
    assert_close(signed["ledger"].residual, 0, scale=1000)


@pytest.mark.slow
def test_sampling_and_beams(results: dict[str, Any]) -> None:
    plain = results["generated_ids"]
    drawn = [run(temperature=50.0, seed=seed, return_relevance=False)["generated_ids"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(run(top_k=1, return_relevance=False)["generated_ids"], plain)
    beams = run(num_beams=3, num_return_sequences=2, length_penalty=0.5, return_relevance=False)
    assert beams["generated_ids"].shape == (2, len(PROMPT) + STEPS)
    banned = run(bad_words_ids=[[int(plain[0, -STEPS])]], return_relevance=False)["generated_ids"]
    assert plain[0, -STEPS] not in banned[0, -STEPS:]


def test_classification_explains_what_is_likely() -> None:
    entry, best = (
        run(task=task, thresholding=p, return_scores=True)["relevance_trace"]
        for task, p in (("multi-class classification", 0.0), ("binary-classification", 1.0))
    )
    seeds, one = (trace[0]["all_wt"]["decoder_lm_head"][0, -1] for trace in (entry, best))
    assert (seeds > 0).all()
    assert_close(seeds.sum(), 100)
    assert (one > 0).sum() == 1
    assert_close(best[0]["all_wt"]["decoder_embeddings"].sum(), 100)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dlb_tokens": 3}, TypeError, "'dlb_tokens'; known are max_new_tokens, min_new_tokens"),
        ({"mode": "contrastive"}, MoejaxError, "'contrastive' is unknown; choose from attnlrp"),
        ({"task": "translation"}, MoejaxError, "task='translation' is unknown; choose from generation"),
        ({"relevance_cache_policy": "memory"}, MoejaxError, "choose from full, summary, disk, none"),
        ({"explain_tokens": "some"}, MoejaxError, "explain_tokens='some'"),
        ({"explain_tokens": [-1]}, MoejaxError, "explain_tokens"),
        ({"prompt": {"ids": [1]}}, PromptError, "no 'input_ids', only 'ids'"),
        ({"prompt": ([[1, 2]], [[1]])}, PromptError, "both are"),
        ({"prompt": ([[1, 2]], [[0, 0]])}, PromptError, "empty"),
        ({"prompt": ([1, 2], [3, 4])}, PromptError, "ones and zeros"),
        ({"prompt": [[1, 97]]}, PromptError, "outside the vocabulary"),
        ({"prompt": [[1, 2], [3]]}, PromptError, "unequal length"),
        ({"temperature": -1.0}, MoejaxError, "temperature=-1"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**options)


def test_empty_prompt_begins_with_the_start_token() -> None:
    result = run(prompt=([[0]], [[0]]), bos_token_id=5, return_relevance=False, max_new_tokens=1)
    np.testing.assert_array_equal(
        result["generated_ids"][0, -1:],
        run(prompt=[[5]], return_relevance=False, max_new_tokens=1)["generated_ids"][0, -1:],
    )


def test_constructor() -> None:
    model = small_torch("olmoe")
    with pytest.raises(ConfigError, match="is a olmoe, not a jetmoe"):
        Backtrace(model, model_type="jetmoe")
    with pytest.raises(ConfigError, match="model_type='bert' is unknown; choose from"):
        Backtrace(model, model_type="bert")
    with pytest.raises(MoejaxError, match="device='tpux'"):
        Backtrace(model, device="tpux")
    with pytest.raises(MoejaxError, match="device='cpu:9'"):
        Backtrace(model, device="cpu:9")
    with pytest.warns(UserWarning, match="device='cuda:1': JAX sees none and uses cpu"):
        assert Backtrace(model, device="cuda:1", init_device="cpu").device == "cpu"
    with pytest.warns(UserWarning, match="activation_dict"):
        Backtrace(model, {"act": "silu"})
    short = Backtrace(engine("olmoe").model, max_length=len(PROMPT) + 1)
    model_and_limit = "Backtrace(olmoe, 2 layers, 6 experts, device='cpu', max_length=8"
    assert repr(short) == f"{model_and_limit})"
    assert short.run_task(inputs=[PROMPT])["generated_ids"].shape == (1, len(PROMPT) + 1)
    assert repr(short) == f"{model_and_limit}, task='generation', rule={Proportional()!r})"
    short.close()
    assert repr(short) == f"{model_and_limit})"
    with pytest.raises(PromptError, match="leaves no room in max_length"):
        short.run_task(inputs=[PROMPT * 2])


@pytest.mark.parametrize("family", FOUR)
def test_attributes(family: str) -> None:
    bt = Backtrace(engine(family).model)
    assert bt.model_type == family
    assert repr(bt).startswith(f"Backtrace({family}, 2 layers")
    graph = bt.model_resource["graph"]
    assert set(graph) == set(bt.layer_stack) == set(bt.model_resource["layers"])
    assert len(bt.layer_stack) == 15
    assert set(bt.model_weights) == {n for n in graph if graph[n]["class"] != "Residual"}
    # relevance of the norm goes to the stream that it reads
    assert graph["decoder_layer_norm_1_1"]["child"] == ["decoder_residual_self_attention_1"]
    assert graph["decoder_embeddings"]["parent"] == ["decoder_residual_self_attention_0", "decoder_layer_norm_0_0"]
    bt.close(unload_model=True)
    assert bt.model is None
    assert repr(bt) == f"Backtrace({family}, unloaded, device='cpu')"
    with pytest.raises(MoejaxError, match="unloaded"):
        bt.run_task(inputs=[PROMPT])
    assert engine(family).model is not None


def test_closing_leaves_results_alone(results: dict[str, Any]) -> None:
    bt = engine("olmoe")
    trace = run()["relevance_trace"]
    bt.clear_intermediates()
    assert bt.all_wt == {}
    assert_same_trace(trace, results["relevance_trace"])


def test_debug_says_why_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    run(return_relevance=False, debug=True)
    assert capsys.readouterr().out == f"{STEPS} tokens generated; stopped by max_new_tokens\n"
