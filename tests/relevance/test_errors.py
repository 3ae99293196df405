"""What ``explain`` refuses, and what it says then."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny.decoders import PROMPT, D, E, H, K, T, V, make_lm, variant_lm

import moejax
from moejax import (
    LM,
    Argmax,
    Contrast,
    Direction,
    Gates,
    LogProbability,
    MeanContrast,
    MoejaxError,
    PromptError,
    RouterChoice,
    Span,
    explain,
    explain_batch,
)
from moejax.relevance.targets import checked_target

LAYERS = 2


class TestErrors:
    @pytest.fixture
    def lm(self) -> LM:
        return variant_lm("plain")

    @pytest.mark.parametrize(
        ("field", "shape", "message"),
        [
            ("experts", (LAYERS, 1, T, E + 1), r"experts of shape \[2, 1, 7, 7\] do not fit \[2, 1, 7, 6\]"),
            ("experts", (LAYERS, 1, T, 1), r"experts of shape \[2, 1, 7, 1\]"),
            ("tokens", (LAYERS, 1, T), r"tokens of shape \[2, 1, 7\] do not fit \[3, 1, 7\]"),
            ("heads", (LAYERS + 1, 1, T, H), r"heads of shape \[3, 1, 7, 4\]"),
            ("heads", (LAYERS, 1, T + 1, H), r"heads of shape \[2, 1, 8, 4\]"),
            ("slots", (LAYERS, 1, T, K + 1), r"slots of shape \[2, 1, 7, 3\] do not fit \[2, 1, 7, 2\]"),
            ("shared", (LAYERS, 1, T, 1), "gates on shared: this model has none"),
            ("attention_experts", (LAYERS, 1, T, E), "gates on attention_experts: this model has none"),
        ],
    )
    def test_gates_of_another_model(self, lm, field, shape, message):
        gates = Gates(**{field: jnp.ones(shape)})
        for run in (explain, LM.__call__):
            with pytest.raises(MoejaxError, match=message):
                run(lm, PROMPT, gates=gates)

    def test_float16(self):
        with pytest.raises(MoejaxError, match="float16 overflows and underflows"):
            explain(make_lm(dtype="float16", layers=1), PROMPT)
        with pytest.raises(MoejaxError, match="float16 overflows and underflows"):
            moejax.Backtrace(make_lm(dtype="float16", layers=1)).run_task(
                inputs=[PROMPT], max_new_tokens=1, return_relevance=True
            )

    @pytest.mark.parametrize("wrong", [None, 1.5, ["w11"]])
    def test_what_is_no_target(self, wrong):
        """The types that these tests check would refuse it before ``explain`` does."""
        with pytest.raises(PromptError, match=r"none of moejax's targets, such as moejax\.Token\("):
            checked_target(wrong)

    def test_one_text_is_no_list(self, lm):
        with pytest.raises(PromptError, match="no list of prompts"):
            explain_batch(lm, "w11")

    @pytest.mark.parametrize("shape", [(1, T + 1), (2, T), (1,)], ids=str)
    def test_padding_of_another_shape(self, lm, shape):
        with pytest.raises(PromptError, match=r"both are \[B T\]"):
            lm(PROMPT, valid=np.ones(shape, bool))
        np.testing.assert_array_equal(lm(PROMPT, valid=np.ones(T, bool)), lm(PROMPT, valid=np.ones((1, T), bool)))

    @pytest.mark.parametrize("other", [np.int64(60), jnp.asarray(60)], ids=["numpy", "jax"])
    def test_ids_as_arrays_give_them(self, lm, other):
        """A rival named twice is one rival."""
        want = {rivals: explain(lm, PROMPT, target=Contrast(11, rivals)).ledger.target for rivals in (60, (60, 7))}
        np.testing.assert_array_equal(explain(lm, PROMPT, target=Contrast(11, other)).ledger.target, want[60])
        twice = explain(lm, PROMPT, target=Contrast(11, [other, 7, 60])).ledger.target
        np.testing.assert_array_equal(twice, want[60, 7])

    @pytest.mark.parametrize("other", [11, "w11", [60, 11], []])
    def test_contrast_of_equal_tokens(self, lm, other):
        with pytest.raises(PromptError, match="a contrast needs two tokens"):
            explain(lm, PROMPT, target=Contrast(11, other))

    def test_unknown_rule(self, lm):
        with pytest.raises(MoejaxError, match="rule 'lrp' is unknown; choose from attnlrp, "):
            explain(lm, PROMPT, rule="lrp")

    @pytest.mark.parametrize(
        "node",
        ["attention", "attention.2", "attention.-1", "logits.0", "stream.3", "neurons.x", "stream.01", "stream.\u0661"],
    )
    def test_unknown_node(self, lm, node):
        with pytest.raises(PromptError, match=f"there is no node '{node}' in this model; do you mean "):
            explain(lm, PROMPT, nodes=[node])

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (MeanContrast(V), "token id 97 is outside"),
            (LogProbability(1, T), "position 7 is outside"),
            (Contrast(1, [2, V]), "token id 97 is outside"),
            (Span([V]), "token id 97 is outside"),
            (Span([]), "the answer is empty"),
            (RouterChoice(LAYERS, 0, versus=1), "layer 2 has no router"),
            (RouterChoice(0, 0, versus=1, attention=True), "layer 0 has no router"),
            (RouterChoice(0, 1, versus=1), "experts 1 and 1 must be two of 6"),
            (RouterChoice(0, 1, versus=E), "experts 1 and 6 must be two of 6"),
            (Direction(np.ones(D - 1), 0), r"a direction of shape \(39,\)"),
            (Direction(np.ones(D), LAYERS + 1), "layers 0 to 2"),
            (Argmax(T), "position 7 is outside"),
        ],
    )
    def test_targets_outside_the_model(self, lm, target, message):
        with pytest.raises(PromptError, match=message):
            explain(lm, PROMPT, target=target)
