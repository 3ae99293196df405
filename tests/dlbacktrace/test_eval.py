"""Every parameter of ``eval`` does what its name says."""

from typing import Any

import numpy as np
import pytest

from dlbacktrace.engines import PROMPT, STEPS, assert_close, engine, run
from moejax import Backtrace, MoejaxError
from moejax.dlbacktrace import api

Step = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
EMBEDDINGS, HEAD = "decoder_embeddings", "decoder_lm_head"


@pytest.fixture(scope="module")
def bt() -> Backtrace:
    return engine("olmoe")


@pytest.fixture(scope="module")
def step(bt: Backtrace) -> Step:
    all_out, all_in, _ = bt.compute_outputs(input_ids=[PROMPT], max_length=STEPS)
    assert list(all_out) == list(all_in) == ["0", "1", "2"]
    assert bt.all_out_model is all_out
    return all_in["2"], all_out["2"]


@pytest.fixture(scope="module")
def plain(bt: Backtrace, step: Step) -> dict[str, np.ndarray]:
    return bt.eval(*step)


def test_default(bt: Backtrace, step: Step, plain: dict[str, np.ndarray], results: dict[str, Any]) -> None:
    for result in (plain, bt.proportional_eval(*step), bt.eval(step[0])):
        for name, value in results["relevance_trace"][-1]["all_wt"].items():
            assert_close(result[name], value, name)
    assert bt.all_wt.keys() == plain.keys()
    assert_close(bt.ledger.residual, 0)


def test_multiplier(bt: Backtrace, step: Step, plain: dict[str, np.ndarray]) -> None:
    halved = bt.eval(*step, multiplier=50)
    assert_close(halved[EMBEDDINGS], plain[EMBEDDINGS] / 2)


def test_scaler_takes_experts_along(bt: Backtrace, step: Step) -> None:
    for name, value in bt.eval(*step, scaler=7).items():
        assert_close(value.sum(), 7, name, scale=7)
    for name, value in bt.all_layer_expert_relevance.items():
        assert_close(value.sum(), 7, name, scale=7)


def test_max_unit_limits_and_leaves_the_small_alone(bt: Backtrace, step: Step, plain: dict[str, np.ndarray]) -> None:
    limit = float(np.abs(plain[EMBEDDINGS]).max())
    for name, value in bt.eval(*step, max_unit=limit).items():
        largest = np.abs(plain[name]).max()
        assert_close(value, plain[name] * min(1, limit / largest), name)
    assert any(np.abs(value).max() > limit for value in plain.values())


def test_predicted_token(bt: Backtrace, step: Step, plain: dict[str, np.ndarray]) -> None:
    other = bt.eval(*step, predicted_token=11)
    assert other[HEAD].sum() == other[HEAD][0, -1, 11] == 100
    assert np.abs(other[EMBEDDINGS] - plain[EMBEDDINGS]).max() > 0.1


def test_start_weights_add_up(bt: Backtrace, step: Step) -> None:
    """Relevance is linear in the initial relevance, at any position."""
    weights = np.zeros((1, len(PROMPT) + STEPS - 1, 97), np.float32)
    weights[0, -1, 11], weights[0, 3, 80] = 30, -20
    parts = [np.where(weights > 0, weights, 0), np.where(weights < 0, weights, 0)]
    both, *each = (bt.eval(*step, start_wt=w) for w in (weights, *parts))
    assert_close(both[HEAD], weights)
    for name in both:
        assert_close(both[name], each[0][name] + each[1][name], name)
    assert not each[1][EMBEDDINGS][0, 4:].any()
    assert_close(each[1][EMBEDDINGS].sum(), -20)


def test_thresholding_and_task(bt: Backtrace, step: Step, plain: dict[str, np.ndarray]) -> None:
    logits = step[1][HEAD][0, -1]
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    second = np.sort(probability)[-2]
    two = bt.eval(*step, thresholding=float(np.nextafter(second, 0) * 0.999), task="multi-class-classification")
    assert (two[HEAD] > 0).sum() == 2
    assert_close(two[HEAD].sum(), 100)
    assert np.abs(two[EMBEDDINGS] - plain[EMBEDDINGS]).max() > 0.01
    one = bt.eval(*step, thresholding=0.0, task="generation")
    assert_close(one[EMBEDDINGS], plain[EMBEDDINGS])


def test_mode(bt: Backtrace, step: Step, plain: dict[str, np.ndarray]) -> None:
    signed = bt.eval(*step, mode="cplrp")
    assert np.abs(signed[EMBEDDINGS] - plain[EMBEDDINGS]).max() > 0.1
    expected = run(mode="cplrp")["relevance_trace"][-1]["all_wt"]
    for name, value in expected.items():
        assert_close(signed[name], value, name, scale=1000)


def test_device(bt: Backtrace, step: Step, plain: dict[str, np.ndarray]) -> None:
    with pytest.warns(UserWarning, match="device='cuda'"):
        result = bt.eval(*step, device="cuda")
    assert_close(result[EMBEDDINGS], plain[EMBEDDINGS])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all_in": {}}, "no token ids at 'decoder_embeddings'"),
        ({"mode": "contrastive"}, "is unknown; choose from"),
        ({"task": "regression"}, "task='regression' is unknown"),
        ({"start_wt": np.ones((1, 2, 97))}, r"start_wt has shape \[1, 2, 97\]"),
        ({"start_wt": np.zeros((1, 9, 97))}, "zero everywhere"),
        ({"predicted_token": 97}, "outside the vocabulary"),
    ],
)
def test_bad_input(bt: Backtrace, step: Step, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MoejaxError, match=message):
        bt.eval(**{"all_in": step[0], "all_out": step[1]} | change)


def test_values_of_another_step_are_refused(bt: Backtrace, step: Step) -> None:
    changed = step[1] | {HEAD: step[1][HEAD][:, ::-1]}
    with pytest.raises(MoejaxError, match="not of one step"):
        bt.eval(step[0], changed)
    assert api.Backtrace is Backtrace
