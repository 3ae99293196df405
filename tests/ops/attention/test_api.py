"""Every implementation of attention against a softmax written out for each head and query in numpy."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.attention import attention, block_size, cudnn
from moejax.ops.attention import fused as fused_attention
from moejax.ops.attention.blocks import spans
from moejax.ops.attention.fused import Kernel, fused, supports
from moejax.ops.attention.registry import ATTENTIONS, Options, register_attention
from ops.attention.explicit import explicit_backward, explicit_forward

B, T, S, H, G, C = 3, 7, 9, 4, 2, 10
LONG = 23

IMPLEMENTATIONS = {
    "plain": {"implementation": "plain"},
    "one block": {"implementation": "blocks"},
    "blocks": {"implementation": "blocks", "block": 5},
    "looped blocks": {"implementation": "blocks", "block": 3},
}


def by_loop(q, k, v, mask, scale, sinks=None):
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen, g = np.flatnonzero(mask[b, t]), h // (q.shape[2] // k.shape[2])
        if not seen.size:
            continue
        scores = np.array([q[b, t, h] @ k[b, s, g] * scale for s in seen])
        top = scores.max()
        pattern = np.exp(scores - top)
        total = pattern.sum() + (0 if sinks is None else np.exp(sinks[h] - top))
        out[b, t, h] = sum(p * v[b, s, g] for p, s in zip(pattern / total, seen, strict=True))
    return out


def operands(heads=H, groups=G, seed=0, queries=T, keys=S):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s) for s in [(B, queries, heads, C), (B, keys, groups, C), (B, keys, groups, C)]]


def some_mask(kind):
    if kind == "causal":
        return np.broadcast_to(np.arange(S) <= np.arange(T)[:, None] + S - T, (B, T, S))
    mask = np.random.default_rng(1).random((B, T, S)) < (1.0 if kind == "full" else 0.4)
    mask[..., 2] = True
    return mask


def causal_mask(tokens, window, padding=2):
    """With the first tokens of the second row padding, so that some queries see nothing."""
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    mask = np.broadcast_to((back >= 0) & (back < (window or tokens)), (B, tokens, tokens)).copy()
    mask[1, :, :padding] = False
    return mask


@pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
class TestEveryImplementation:
    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("kind", ["causal", "random"])
    @pytest.mark.parametrize(("heads", "groups"), [(6, 2), (5, 5)])
    def test_against_numpy(self, options, kind, heads, groups):
        operand, mask = operands(heads, groups), some_mask(kind)
        got = jax.jit(partial(attention, scale=0.3, **options))(*operand, mask)
        np.testing.assert_allclose(got, by_loop(*operand, mask, 0.3), rtol=1e-12, atol=1e-12)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("sunk", [False, True], ids=["no sinks", "sinks"])
    @pytest.mark.parametrize("window", [None, 5])
    def test_windows_padding_and_sinks(self, options, window, sunk):
        """Values, and gradients by finite differences in a random direction."""
        operand, mask = operands(queries=LONG, keys=LONG), causal_mask(LONG, window)
        sinks = [np.linspace(-1, 2, H)] if sunk else []
        run = partial(attention, mask=jnp.asarray(mask), scale=0.3, causal=True, window=window, **options)

        @jax.jit
        def value(q, k, v, *sinks):
            return run(q, k, v, sinks=sinks[0] if sinks else None)

        got = value(*operand, *sinks)
        np.testing.assert_allclose(got, by_loop(*operand, mask, 0.3, *sinks), rtol=1e-11, atol=1e-12)
        received = np.random.default_rng(2).normal(size=got.shape)
        gradients = jax.jit(lambda *a: jax.vjp(value, *a)[1](received))(*operand, *sinks)
        rng, step = np.random.default_rng(3), 1e-6
        for i, gradient in enumerate(gradients):
            along = rng.normal(size=gradient.shape)
            ends = [
                value(*(x + sign * step * along if i == j else x for j, x in enumerate([*operand, *sinks])))
                for sign in (1, -1)
            ]
            want = ((ends[0] - ends[1]) / (2 * step) * received).sum()
            np.testing.assert_allclose((gradient * along).sum(), want, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_many_cotangents_equal_single_ones(self, options, dtype):
        q, k, v = (jnp.asarray(a, dtype) for a in operands(queries=T, keys=T))
        mask = jnp.asarray(causal_mask(T, None))

        def pull(c):
            return jax.vjp(lambda *a: attention(*a, mask, scale=0.3, causal=True, **options), q, k, v)[1](c)

        received = jnp.asarray(np.random.default_rng(4).normal(size=(5, *q.shape)), dtype)
        together, pull = jax.jit(jax.vmap(pull))(received), jax.jit(pull)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.03, "atol": 0.03}
        for n in range(5):
            for many, one, x in zip(together, pull(received[n]), (q, k, v), strict=True):
                assert many.dtype == x.dtype
                np.testing.assert_allclose(many[n].astype(float), one.astype(float), **close)

    def test_bfloat16_keeps_scores_in_float32(self, options):
        operand = [jnp.asarray(a, jnp.bfloat16) for a in operands()]
        got = attention(*operand, jnp.asarray(some_mask("causal")), scale=5.0, **options)
        assert got.dtype == jnp.bfloat16
        want = by_loop(*(np.asarray(a, np.float64) for a in operand), some_mask("causal"), 5.0)
        # scores of size 50 would be off by 0.2 in bfloat16, weights by as much
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.03)

    def test_bfloat16_gradients_err_no_more_than_the_operands(self, options):
        operand = [jnp.asarray(a, jnp.bfloat16) for a in operands(queries=LONG, keys=LONG)]
        mask = jnp.asarray(causal_mask(LONG, 11))

        def gradients(dtype, **options):
            def run(*a):
                return (attention(*a, mask, scale=0.3, **options).astype(jnp.float32) ** 2).sum()

            return jax.jit(jax.grad(run, argnums=(0, 1, 2)))(*(a.astype(dtype) for a in operand))

        exact = gradients(jnp.float32, implementation="plain")
        for got, want in zip(gradients(jnp.bfloat16, causal=True, window=11, **options), exact, strict=True):
            error = np.sqrt(((got.astype(jnp.float32) - want) ** 2).mean() / (want**2).mean())
            assert error < 0.01

    @pytest.mark.parametrize("scale", [0.3, 1e4])
    def test_query_that_sees_nothing(self, options, scale):
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
        mask = np.array(some_mask("causal"))
        mask[1, 3] = False

        @jax.jit
        def both(*operand):
            out, pull = jax.vjp(lambda *a: attention(*a, jnp.asarray(mask), scale=scale, **options), *operand)
            return out, pull(jnp.ones_like(out))

        out, gradients = both(q, k, v)
        assert not np.asarray(out)[1, 3].any()
        assert all(bool(jnp.isfinite(g).all()) for g in gradients)
        assert not np.asarray(gradients[0])[1, 3].any()

    def test_masked_keys_have_no_influence(self, options):
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
        mask = jnp.asarray(some_mask("causal")).at[:, :, 4].set(False)

        def run(k, v):
            return attention(q, k, v, mask, scale=0.3, **options)

        out, pull = jax.vjp(run, k, v)
        np.testing.assert_array_equal(out, run(k.at[:, 4].set(1e6), v.at[:, 4].set(-1e6)))
        assert not any(np.asarray(g)[:, 4].any() for g in pull(jnp.ones_like(out)))


class TestBlocks:
    @pytest.mark.parametrize("tokens", [1, 7, 16, 45, 128])
    @pytest.mark.parametrize("block", [1, 3, 16, 200])
    @pytest.mark.parametrize("window", [None, 5])
    def test_spans_hold_every_edge_and_are_few(self, tokens, block, window):
        ranges = spans(tokens, tokens, min(block, tokens), True, window)
        assert len(ranges) <= 5
        assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])]
        assert ranges[-1].stop == tokens
        for r in ranges:
            assert (r.stop - r.start) % r.blocks == 0
            assert (r.stop - r.start) // r.blocks <= block
            assert r.low <= max(0, r.start - (window or tokens) + 1)
            assert r.high == r.stop

    def test_keys_out_of_sight_are_skipped(self):
        """With causal ranges, and more with a narrow window."""

        def edges(window):
            return sum((r.stop - r.start) * (r.high - r.low) for r in spans(4096, 4096, 512, True, window))

        assert edges(None) == 4096**2 * 5 / 8
        assert edges(128) < 4096**2 * 0.29

    def test_scores_of_all_queries_are_never_held(self):
        """The largest array of a compiled backward pass over 2048 tokens, against the plain one's."""

        def shape(heads):
            return jax.ShapeDtypeStruct((1, 2048, heads, C), jnp.float32)

        mask = jax.ShapeDtypeStruct((1, 2048, 2048), bool)

        def temporary(**options):
            def run(q, k, v, mask):
                return attention(q, k, v, mask, scale=0.3, causal=True, **options).sum()

            program = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(shape(H), shape(G), shape(G), mask).compile()
            return program.memory_analysis().temp_size_in_bytes

        assert temporary(implementation="blocks", block=64) < temporary(implementation="plain") / 4

    def test_block_size(self):
        assert block_size(512, 512 * 16) == 512
        assert block_size(4096, 4096 * 16) == 512
        assert block_size(4096, 4096 * 64) == 128
        assert block_size(300, 10**9) == 128


EXPLICIT = Kernel(explicit_forward, explicit_backward)
CAUSAL = Options(scale=0.3, causal=True, window=None, block=8)


class TestFused:
    """What surrounds the kernel, with the textbook's formulas in its place."""

    @pytest.mark.parametrize("sunk", [False, True], ids=["no sinks", "sinks"])
    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("padding", [None, 0, 2])
    def test_equals_blocks(self, window, padding, sunk):
        """Values and gradients, of one cotangent and of several; with padding, blocks take over at run time.

        ``None``: no padding, and no mask to say so.
        """
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8))
        mask = None if padding is None else jnp.asarray(causal_mask(8, window, padding))
        received = jnp.asarray(np.random.default_rng(6).normal(size=(3, *q.shape)), jnp.float32)

        sinks = [jnp.linspace(-1, 2, H)] if sunk else []

        def both(run):
            def read(q, k, v, *sinks):
                return run(q, k, v, mask, sinks[0] if sinks else None)

            out, pull = jax.vjp(read, q, k, v, *sinks)
            return out, pull(received[0]), jax.vmap(pull)(received)

        def blocks(q, k, v, mask, sinks):
            return attention(
                q, k, v, mask, sinks=sinks, scale=0.3, causal=True, window=window, block=8, implementation="blocks"
            )

        got = jax.jit(lambda: both(partial(fused, options=CAUSAL._replace(window=window), kernel=EXPLICIT)))()
        want = jax.jit(lambda: both(blocks))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)

    def test_queries_alone_in_a_batch(self):
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8))
        mask = jnp.asarray(causal_mask(8, None, 0))

        def run(q):
            return fused(q, k, v, mask, None, CAUSAL, kernel=EXPLICIT)

        np.testing.assert_allclose(jax.vmap(run)(jnp.stack([q, 2 * q]))[1], run(2 * q), rtol=1e-5, atol=1e-5)

    def test_padding_is_not_left_to_the_kernel(self):
        """It would let queries see padding."""
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8))
        mask = jnp.asarray(causal_mask(8, None))
        out = fused(q, k, v, mask, None, CAUSAL, kernel=EXPLICIT)
        assert not np.asarray(out)[1, :2].any()
        assert np.asarray(out)[0, :2].any()

    def test_statistics_are_kept(self):
        """The backward pass does not run the forward pass, which alone takes a logarithm, again."""
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8))

        def run(q):
            return fused(q, k, v, None, None, CAUSAL, kernel=EXPLICIT).sum()

        assert str(jax.make_jaxpr(jax.value_and_grad(run))(q)).count(" log ") == 1

    @pytest.mark.parametrize(
        ("capability", "taken"), [(None, False), ("7.5", False), ("8.0", True), ("9.0", True), ("gfx942", False)]
    )
    def test_on_gpus_that_have_it(self, monkeypatch, capability, taken):
        q = jnp.zeros((1, 8, H, 16), jnp.bfloat16)
        device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(fused_attention, "target", lambda: device)
        assert supports(q, q, True) is taken

    def test_never_without_a_gpu(self):
        q = jnp.zeros((1, 8, H, 16), jnp.bfloat16)
        assert not supports(q, q, True)


class TestChoice:
    @pytest.mark.parametrize("window", [None, 5])
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_no_mask_is_the_causal_one(self, implementation, window):
        q, k, v = operands(queries=8, keys=8)
        run = partial(attention, scale=0.3, causal=True, window=window, **IMPLEMENTATIONS[implementation])
        out = run(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), None)
        want = by_loop(q, k, v, causal_mask(8, window, padding=0), 0.3)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)

    def test_no_branch_without_a_mask(self):
        """Whether all is causal is known when the program is compiled, and not asked again in every layer."""
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8))

        def run(mask):
            return fused(q, k, v, mask, None, CAUSAL, kernel=EXPLICIT)

        assert "cond[" in str(jax.make_jaxpr(run)(jnp.asarray(causal_mask(8, None))))
        assert "cond[" not in str(jax.make_jaxpr(lambda: run(None))())

    def test_no_mask_must_be_causal(self):
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
        with pytest.raises(ValueError, match="causal=True"):
            attention(q, k, v, None, scale=1.0)

    def test_edges(self):
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
        mask, edges = jnp.asarray(some_mask("random")), jnp.ones((B, H, T, S))

        def run(e):
            return attention(q, k, v, mask, scale=0.3, edges=e)

        out, pull = jax.vjp(run, edges)
        np.testing.assert_allclose(out, attention(q, k, v, mask, scale=0.3), rtol=1e-6, atol=1e-6)
        received = jnp.asarray(np.random.default_rng(5).normal(size=out.shape), jnp.float32)
        (relevance,) = pull(received)
        np.testing.assert_allclose(relevance.sum(-1), (out * received).sum(-1).swapaxes(1, 2), rtol=1e-4, atol=1e-5)
        cut = run(edges.at[0, 1, 2].set(0))
        assert not np.asarray(cut)[0, 2, 1].any()

    def test_without_the_kernel(self, monkeypatch):
        monkeypatch.setattr(cudnn, "AVAILABLE", False)
        monkeypatch.setattr(cudnn, "supports", lambda *_: True)
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8))
        blocks = attention(q, k, v, None, scale=1.0, causal=True, implementation="blocks")
        np.testing.assert_array_equal(attention(q, k, v, None, scale=1.0, causal=True), blocks)
        with pytest.raises(ValueError, match="'fused' is not in this version of JAX"):
            attention(q, k, v, None, scale=1.0, causal=True, implementation="fused")

    def test_unknown_and_unfit(self):
        q, k, v = (jnp.asarray(a, jnp.float32) for a in operands())
        mask = jnp.asarray(some_mask("full"))
        with pytest.raises(ValueError, match="'flash' is unknown; choose from"):
            attention(q, k, v, mask, scale=1.0, implementation="flash")
        with pytest.raises(ValueError, match="does not read edges"):
            attention(q, k, v, mask, scale=1.0, edges=jnp.ones((B, H, T, S)), implementation="blocks")


@pytest.fixture
def registered():
    """The table of implementations, from which all that a test registers is removed in the end."""
    with ATTENTIONS.restored():
        yield ATTENTIONS


class TestRegistration:
    def operands(self):
        return [jnp.asarray(a, jnp.float32) for a in operands(queries=8, keys=8)]

    @pytest.mark.usefixtures("registered")
    def test_from_outside_of_the_package(self):
        """By name if its priority is low, by default if it is high and the operands are supported."""
        masks = []

        @register_attention("mean", priority=0)
        def mean(q, k, v, mask, sinks, options):
            masks.append(mask)
            return jnp.broadcast_to(jnp.repeat(v.mean(1, keepdims=True), H // G, axis=2), q.shape)

        q, k, v = self.operands()
        got = attention(q, k, v, None, scale=0.3, causal=True, window=3, implementation="mean")
        np.testing.assert_allclose(got[0, 0, H - 1], v[0, :, G - 1].mean(0), rtol=1e-6)
        np.testing.assert_array_equal(masks[0], causal_mask(8, 3, padding=0))
        assert attention(q, k, v, None, scale=0.3, causal=True).std() != got.std()
        with pytest.raises(ValueError, match="does not read edges"):
            attention(q, k, v, None, scale=0.3, causal=True, edges=jnp.ones((B, H, 8, 8)), implementation="mean")
        register_attention("zero", priority=99, supports=lambda q, k, v, causal: causal, optional_mask=True)(
            lambda q, k, v, mask, sinks, options: q if mask is None else 2 * q
        )
        np.testing.assert_array_equal(attention(q, k, v, None, scale=0.3, causal=True), q)
        full = jnp.ones((B, 8, 8), bool)
        assert not np.array_equal(attention(q, k, v, full, scale=0.3), 2 * q)

    def test_removed_afterwards(self):
        assert set(ATTENTIONS) == {"plain", "blocks", "fused"}

    @pytest.mark.parametrize("edges", [True, False])
    @pytest.mark.parametrize("kernel", [True, False])
    def test_default_choice(self, monkeypatch, edges, kernel):
        """Plain with edges, else cuDNN's kernel if it takes the operands, else blocks."""
        q, k, v = self.operands()
        taken = []
        monkeypatch.setattr(cudnn, "AVAILABLE", True)
        monkeypatch.setattr(cudnn, "supports", lambda *_: kernel)
        for name, entry in ATTENTIONS.items():
            monkeypatch.setattr(entry, "compute", lambda q, *_, name=name: taken.append(name) or q)
        attention(q, k, v, None, scale=0.3, causal=True, edges=jnp.ones((B, H, 8, 8)) if edges else None)
        assert taken == ["plain" if edges else "fused" if kernel else "blocks"]
