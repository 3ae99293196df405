"""Targets, batches and chunks: many questions in one pass are answered as they would be one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from tiny.decoders import PROMPT, ROW, C, E, H, K, T, V, make_lm, variant_lm
from tiny.tokenizers import text

from moejax import LM, Argmax, Continuation, Contrast, Generated, PromptError, Relevance, Token, explain
from moejax.relevance import explain_batch
from moejax.rules import AttnLRP, Plain

L = 2
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FIELDS = ("layers", "experts", "heads")


@pytest.fixture(scope="module")
def lm() -> LM:
    return variant_lm("plain")


def assert_same(got: Relevance, want: Relevance, target: int = 0, length: int | None = None) -> None:
    """Target number ``target`` of ``got`` equals the only one of ``want``, on the first ``length`` tokens."""
    for name in FIELDS:
        ours, other = getattr(got, name)[target], getattr(want, name)[0]
        np.testing.assert_allclose(ours[:, :length], other[:, :length], **CLOSE, err_msg=name)
    np.testing.assert_allclose(got.ledger.target[target], want.ledger.target[0], **CLOSE)


class TestShapes:
    def test_every_field(self, lm):
        answer = [3, 1, 4]
        relevance = explain(lm, PROMPT[:5], target=Continuation(answer))
        n = len(answer)
        assert relevance.token_ids.tolist() == [*PROMPT[:5], 3, 1]
        assert relevance.positions.tolist() == [4, 5, 6]
        assert relevance.labels == ["'w3'", "'w1'", "'w4'"]
        assert relevance.tokens.shape == (n, T)
        assert relevance.layers.shape == (n, L + 1, T)
        assert relevance.experts.shape == (n, L, T, K)
        assert relevance.heads.shape == (n, L, T, H)
        assert relevance.expert_ids.shape == relevance.expert_weights.shape == (L, T, K)
        assert {getattr(relevance, name).dtype for name in FIELDS} == {np.dtype(np.float32)}
        assert relevance.num_experts == E
        assert "".join(relevance.pieces) == " ".join(f"w{i}" for i in relevance.token_ids)
        assert C not in relevance.heads.shape
        np.testing.assert_array_equal(relevance.tokens, relevance.layers[:, 0])

    def test_by_expert(self, lm):
        relevance = explain(lm, PROMPT[:5], target=Continuation([3, 1, 4]))
        want = np.zeros((3, L, E))
        for layer in range(L):
            for t in range(T):
                for k in range(K):
                    want[:, layer, relevance.expert_ids[layer, t, k]] += relevance.experts[:, layer, t, k]
        np.testing.assert_allclose(relevance.by_expert(), want, **CLOSE)

    def test_target_and_candidates_are_the_logits(self, lm):
        logits = np.asarray(lm(ROW))[0, 3]
        relevance = explain(lm, PROMPT, target=Token(11, position=3))
        np.testing.assert_allclose(relevance.ledger.target, logits[[11]], **CLOSE)
        best = relevance.candidates[0]
        assert [c.id for c in best] == np.argsort(-logits)[:5].tolist()
        np.testing.assert_allclose([c.logit for c in best], np.sort(logits)[::-1][:5], **CLOSE)
        np.testing.assert_allclose(
            [c.probability for c in best], np.asarray(jax.nn.softmax(logits))[[c.id for c in best]], **CLOSE
        )

    def test_no_vocabulary_is_fetched(self, lm, monkeypatch):
        """Sixteen targets of GPT-OSS are three million logits, of which five each are shown."""
        fetched, device_get = [], jax.device_get
        monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree))
        relevance = explain(lm, PROMPT, target=Token(11, position=3))
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(fetched)]
        assert len(shapes) > len(FIELDS)
        assert not any(V in shape for shape in shapes)
        assert len(relevance.candidates[0]) == 5


class TestTargets:
    def test_argmax_is_the_token_with_the_largest_logit(self, lm):
        for position in (-1, 2, -5):
            best = int(np.asarray(lm(ROW))[0, position].argmax())
            argmax = explain(lm, PROMPT, target=Argmax(position))
            assert argmax.labels == [f"'w{best}'"]
            assert_same(argmax, explain(lm, PROMPT, target=Token(best, position)))

    def test_contrast_is_the_difference(self, lm):
        contrast = explain(lm, PROMPT, target=Contrast("w11", 60, 4))
        assert contrast.labels == ["'w11' - 'w60'"]
        one, other = (explain(lm, PROMPT, target=Token(i, 4)) for i in (11, 60))
        for name in FIELDS:
            np.testing.assert_allclose(getattr(contrast, name), getattr(one, name) - getattr(other, name), **CLOSE)
        np.testing.assert_allclose(contrast.ledger.target, one.ledger.target - other.ledger.target, **CLOSE)

    def test_many_targets_equal_single_ones(self, lm):
        answer = [3, 1, 4]
        together = explain(lm, PROMPT[:5], target=Continuation(answer))
        for n, token in enumerate(answer):
            single = explain(lm, together.token_ids, target=Token(token, 4 + n))
            assert_same(together, single, n)
            np.testing.assert_allclose(together.ledger.residual[n], 0, atol=1e-5)

    @pytest.mark.parametrize("chunk", [1, 2])
    def test_chunks_change_nothing(self, lm, chunk):
        target = Continuation("w3 w1 w4")
        whole, parts = (explain(lm, PROMPT[:5], target=target, chunk=c) for c in (None, chunk))
        for name in FIELDS:
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), **CLOSE)
        for name, leak in whole.ledger.leaks.items():
            np.testing.assert_allclose(parts.ledger.leaks[name], leak, **CLOSE)

    def test_prefix_causality(self, lm):
        """Each step's relevance is that of the sequence as it was at that step; what came later has exactly none."""
        answer = [3, 1, 4]
        together = explain(lm, PROMPT[:5], target=Continuation(answer))
        for n, token in enumerate(answer):
            length = 5 + n
            assert_same(together, explain(lm, [*PROMPT[:5], *answer[:n]], target=Token(token)), n, length)
            for name in FIELDS:
                later = getattr(together, name)[n][:, length:]
                assert not later.any(), name

    def test_generated_is_its_own_continuation(self, lm):
        answer = lm.generate_ids([PROMPT[:5]], max_new_tokens=3)[0]
        generated = explain(lm, PROMPT[:5], target=Generated(3))
        want = explain(lm, PROMPT[:5], target=Continuation(answer))
        assert generated.labels == want.labels == [f"'w{i}'" for i in answer]
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(generated, name), getattr(want, name))
        assert [c[0].id for c in generated.candidates] == answer, "greedy takes the best candidate"

    def test_generation_that_ends_at_once_explains_the_end(self):
        best = int(np.asarray(make_lm(layers=1)(ROW))[0, -1].argmax())
        ending = make_lm(layers=1, eos_ids=(best,))
        relevance = explain(ending, PROMPT, target=Generated(3))
        assert relevance.token_ids.tolist() == PROMPT
        assert relevance.labels == [f"'w{best}'"]


class TestBatches:
    def test_padded_batch_equals_single_prompts(self, lm):
        prompts = [PROMPT, PROMPT[2:6], PROMPT[:1]]
        batch = explain_batch(lm, [text(p) for p in prompts])
        assert [r.prompt for r in batch] == [text(p) for p in prompts]
        assert [r.tokens.shape for r in batch] == [(1, 7), (1, 4), (1, 1)]
        for prompt, row in zip(prompts[:2], batch, strict=False):
            single = explain(lm, text(prompt))
            assert row.tokens.shape == (1, len(prompt))
            assert row.labels == single.labels
            assert row.positions.tolist() == single.positions.tolist() == [len(prompt) - 1]
            np.testing.assert_array_equal(row.expert_ids, single.expert_ids)
            assert_same(row, single)
            for name, leak in single.ledger.leaks.items():
                np.testing.assert_allclose(row.ledger.leaks[name], leak, **CLOSE)

    def test_text_and_ids_are_the_same_prompt(self, lm):
        np.testing.assert_array_equal(explain(lm, text(PROMPT)).layers, explain(lm, PROMPT).layers)
        np.testing.assert_array_equal(explain(lm, jnp.asarray(PROMPT)).layers, explain(lm, PROMPT).layers)


class TestNumbers:
    @pytest.mark.slow
    def test_jit_changes_nothing(self):
        lm = make_lm(layers=1)
        target = Contrast(11, 60)
        compiled = explain(lm, PROMPT[:3], target=target, rule=AttnLRP(router="uniform"))
        with jax.disable_jit():
            assert_same(explain(lm, PROMPT[:3], target=target, rule=AttnLRP(router="uniform")), compiled)

    def test_bfloat16_reads_out_in_float32_and_nearly_closes(self):
        narrow = explain(make_lm(dtype="bfloat16", layers=1), PROMPT, target=Contrast(11, 60))
        wide = explain(make_lm(layers=1), PROMPT, target=Contrast(11, 60))
        for name in FIELDS:
            a, b = getattr(narrow, name), getattr(wide, name)
            assert a.dtype == np.float32
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99
        assert np.abs(narrow.ledger.residual).max() < 0.02 * np.abs(narrow.tokens).sum()

    def test_plain_is_gradient_times_input(self):
        """The embedding matrix's gradient holds that of every token, if the head is its own and no token repeats."""
        lm, prompt = variant_lm("clip-bias"), [5, 80, 33, 96, 0, 34, 12]
        tokens = jnp.asarray([prompt])

        @jax.jit
        @jax.grad
        def gradient(embedding, decoder):
            parts = jax.tree_util.tree_map_with_path(
                lambda path, leaf: embedding if jax.tree_util.keystr(path) == ".embedding" else leaf, decoder
            )
            logits = parts(tokens)[0, 4]
            return logits[11] - logits[60]

        embedding = lm.decoder.embedding
        want = (embedding * gradient(embedding, lm.decoder)).sum(-1)[tokens[0]]
        got = explain(lm, prompt, target=Contrast(11, 60, 4), rule=Plain())
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got.tokens[0], want, rtol=1e-4, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "target", "message"),
        [
            ([], Argmax(), "the prompt is empty"),
            ("", Argmax(), "the prompt is empty"),
            ([1, V], Argmax(), "token id 97 is outside the vocabulary of 97"),
            ([-1, 1], Argmax(), "token id -1 is outside"),
            (PROMPT, Token(V), "token id 97 is outside"),
            (PROMPT, Token(-1), "token id -1 is outside"),
            (PROMPT, Contrast(0, V), "token id 97 is outside"),
            (PROMPT, Continuation([3, V]), "token id 97 is outside"),
            (PROMPT, Continuation([]), "empty"),
            (PROMPT, Argmax(T), "position 7 is outside the prompt of 7 tokens"),
            (PROMPT, Token(1, -T - 1), "position -8 is outside"),
            (PROMPT, Contrast(1, 2, T), "position 7 is outside"),
            (PROMPT, Token("w1 w2"), "'w1 w2' is 2 tokens, not one: 'w1', 'w2'"),
            (PROMPT, Contrast("w1", "w2 w3"), "'w2 w3' is 2 tokens, not one"),
            (PROMPT, Contrast("", "w2"), "'' is 0 tokens, not one: no tokens"),
        ],
    )
    def test_bad_prompts_and_targets(self, lm, prompt, target, message):
        with pytest.raises(PromptError, match=message):
            explain(lm, prompt, target=target)

    @pytest.mark.parametrize(("prompt", "target"), [("w1", Argmax()), ([1], Token("w1")), ([1], Continuation("w1"))])
    def test_text_without_a_tokenizer(self, lm, prompt, target):
        with pytest.raises(PromptError, match=r"toy has no tokenizer; pass token ids"):
            explain(LM(lm.decoder, name="toy"), prompt, target=target)

    def test_ids_without_a_tokenizer(self, lm):
        relevance = explain(LM(lm.decoder, name="toy"), PROMPT, target=Argmax())
        assert relevance.pieces == [f"[{i}]" for i in PROMPT]

    def test_empty_batch(self, lm):
        assert explain_batch(lm, []) == []

    @pytest.mark.parametrize("prompt", [[1.5, 2.0], jnp.asarray([PROMPT, PROMPT]), [PROMPT, PROMPT]])
    def test_not_a_row_of_ids(self, lm, prompt):
        # with the annotations checked, they are first to object
        with pytest.raises((PromptError, TypeCheckError)):
            explain(lm, prompt)
