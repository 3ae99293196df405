"""Figures show every token of every step; what cannot be drawn is refused with a hint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlbacktrace.engines import LAYERS, PROMPT, STEPS, engine, run, tokenizer
from moejax import MoejaxError
from moejax.report import backtrace as report


def picture(figure: Any) -> np.ndarray:
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def labels(figure: Any, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def test_map_is_right_for_every_step(results: dict[str, Any], tmp_path: Path) -> None:
    trace, ids = results["relevance_trace"], results["generated_ids"][0].tolist()
    figure = engine("olmoe").visualize_tokenwise_relevance_map(trace, [PROMPT], tokenizer())
    shown = picture(figure)
    assert shown.shape == (len(PROMPT) + STEPS - 1, STEPS)
    for index, step in enumerate(trace):
        length = len(PROMPT) + index
        np.testing.assert_allclose(shown[:length, index], step["all_wt"]["decoder_embeddings"][0].sum(-1), rtol=1e-5)
        assert np.isnan(shown[length:, index]).all()
    assert labels(figure, "y") == [f"w{i}" for i in ids[:-1]]
    assert labels(figure, "x") == [f"{n}: w{i}" for n, i in enumerate(ids[-STEPS:])]
    figure.savefig(tmp_path / "map.png")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_skipped_steps_do_not_shift_labels(results: dict[str, Any], tmp_path: Path) -> None:
    trace = run(explain_tokens=[2], relevance_cache_policy="disk", relevance_cache_dir=tmp_path)["relevance_trace"]
    ids, bt = results["generated_ids"], engine("olmoe")
    for given in (None, ids):
        figure = bt.visualize_tokenwise_relevance_map(trace, [PROMPT], tokenizer(), generated_ids=given)
        assert labels(figure, "x") == [f"2: w{ids[0, -1]}"]
        assert labels(figure, "y") == [f"w{i}" for i in ids[0, :-1]]
    run(prompt=[PROMPT[::-1]], return_relevance=False)
    figure = bt.visualize_tokenwise_relevance_map(trace, [PROMPT], tokenizer())
    assert labels(figure, "y")[-2:] == ["?", "?"]


def test_one_step(results: dict[str, Any]) -> None:
    bt, trace = engine("olmoe"), results["relevance_trace"]
    node = "decoder_feed_forward_0"
    figure = bt.visualize_input_heatmap_for_token(trace, 2, [PROMPT], tokenizer(), input_key=node)
    np.testing.assert_allclose(picture(figure)[0], trace[2]["all_wt"][node][0].sum(-1), rtol=1e-5)
    for options, message in (
        ({"n": 3}, "step 3 is not in the trace; explained are 0, 1, 2"),
        ({"input_key": "decoder"}, "is not a node; choose from decoder_lm_head"),
        ({"trace": []}, "explained are none"),
        ({"trace": [{"step_index": 1, "token_id": 3, "summary": {}}]}, "sums only"),
    ):
        with pytest.raises(MoejaxError, match=message):
            bt.visualize_input_heatmap_for_token(**{"trace": trace, "n": 1, "input_ids": [PROMPT]} | options)
    with pytest.raises(MoejaxError, match="trace is empty"):
        bt.visualize_tokenwise_relevance_map([], [PROMPT])


def test_graph(tmp_path: Path) -> None:
    last, bt = run()["relevance_trace"][-1]["all_wt"], engine("olmoe")
    figure = bt.visualize_dlbacktrace(tmp_path / "graph")
    assert "<svg" in (tmp_path / "graph.svg").read_text()
    written = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert len(written) == 3 + 6 * LAYERS
    for name, value in last.items():
        assert any(w.startswith(f"{name}  [") and w.endswith(f"  {np.abs(value).sum():.4g}") for w in written), name
    # and an arrow for each edge: a sum has two, everything else one
    assert len(figure.axes[0].texts) - len(written) == 2 + 8 * LAYERS
    few = bt.visualize_dlbacktrace(top_k=3)
    assert len(few.axes[0].patches) >= 3
    assert len(few.axes[0].patches) < len(figure.axes[0].patches)
    fast = bt.visualize_dlbacktrace(engine_auto_threshold=1)
    assert not fast.axes[0].texts
    assert len(fast.axes[0].patches) == 3 + 6 * LAYERS
    with pytest.raises(MoejaxError, match="no node has relevance_threshold"):
        bt.visualize_dlbacktrace(relevance_threshold=1e9)
    bt.clear_intermediates()
    with pytest.raises(MoejaxError, match="nothing was explained yet"):
        bt.visualize_dlbacktrace()


def test_many_nodes_and_tokens_are_drawn() -> None:
    columns = [np.random.default_rng(i).normal(size=300 + i) for i in range(30)]
    figure = report.token_map(columns, ["$tok"] * 329, ["x"] * 30, 300, (8, 6))
    figure.canvas.draw()
    assert len(labels(figure, "y")) < 61
