"""The bench: its floor counted by hand, its rows for every case, and what it says of mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import MoejaxError
from moejax.checkpoints.plan import leaf_paths
from moejax.cli import run
from moejax.lm import LM
from moejax.models import Decoder, FlatDecoder, family
from moejax.report.bench import heading_lines, row_line
from moejax.study.bench import CASES, SHAPES, BenchRow, Case, bench, published, random_decoder
from moejax.study.bench.floor import DeviceLimits, floor_ms

V, D, F, E, K, L = 503, 64, 32, 64, 8, 2
QUICK = {"tokens": 19, "long_tokens": 23, "repeats": 1}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    """The true ones have the published numbers of parameters, the toy ones the same kind."""
    true, toy = published(name), published(name, toy=True)
    assert (true.model_type, true.is_packed) == (toy.model_type, toy.is_packed)
    leaves = leaf_paths(Decoder.abstract(true, jnp.bfloat16))
    values = sum(leaf.size * (2 if path.endswith("blocks") else 1) for path, leaf in leaves if "scales" not in path)
    billions = {"olmoe": 6.9, "qwen3_moe": 30.5, "gpt_oss": 20.9, "jetmoe": 8.5}[true.model_type]
    assert values / 1e9 == pytest.approx(billions, rel=0.05)


class TestFloor:
    def floor(self, case: Case, bandwidth: float = 1e9, rate: float = 1e30) -> float:
        decoder = random_decoder(published("olmoe-1b-7b", toy=True))
        return floor_ms(decoder, case, 19, DeviceLimits(bandwidth, rate))

    def test_bytes_and_products(self):
        def nothing(*_):
            return None

        experts, rest = L * E * 3 * D * F, V * D + D + L * (4 * D * D + 4 * D + E * D)
        total, active = experts + rest, experts * K / E + rest
        assert self.floor(Case("", nothing, 1)) == pytest.approx(2 * total / 1e9 * 1e3)
        assert self.floor(Case("", nothing, 2, 16)) == pytest.approx(2 * 2 * total / 1e9 * 1e3)
        assert self.floor(Case("", nothing, 0)) == pytest.approx(2 * active / 1e9 * 1e3)
        products = 2 * (active - V * D) * 19
        # scores and their sum over values, of each token with those up to it
        attention = 2 * 2 * (19 * 20 / 2) * D * L
        backward = Case("", nothing, 2, 16)
        assert self.floor(backward, 1e30, 1e9) == pytest.approx((products * 17 + attention * 33) / 1e9 * 1e3)
        # forward it reads for longer than it multiplies, backward not, and these do not share their time
        rate = (products + attention) / (total * 2 / 1e9) * 2
        each = 2 * total / 1e9 + (products + 2 * attention) * 16 / rate
        assert self.floor(backward, 1e9, rate) == pytest.approx(each * 1e3)

    @pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
    def test_experts_alone_are_used_in_part(self, kind):
        """A dense layer and a shared expert are read and multiplied for every token."""
        sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 128, "num_experts": 16}
        experts = experts | {"num_experts_per_tok": 2} if kind == "qwen2_moe" else {}
        rest = {
            "model_type": kind,
            "vocab_size": 503,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
        }
        decoder = random_decoder(family(kind).config(sizes | experts | rest | {"max_position_embeddings": 64}))
        read = products = 0.0
        for path, leaf in leaf_paths(decoder):
            used = 2 / 16 if ".experts." in path else 1
            read += used * leaf.nbytes if path != "embedding" else 0
            products += 2 * used * leaf.size * 19 if path not in ("embedding", "head") else 0
        attention = 2 * 2 * (19 * 20 / 2) * 64 * 2
        decode, forward = (Case("", lambda *_: None, passes) for passes in (0, 1))
        assert floor_ms(decoder, decode, 19, DeviceLimits(1e9, 1e30)) == pytest.approx(read / 1e9 * 1e3)
        assert floor_ms(decoder, forward, 19, DeviceLimits(1e30, 1e9)) == pytest.approx(
            (products + attention) / 1e9 * 1e3
        )


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(published("olmoe-1b-7b", toy=True))


def test_norms_are_one_and_biases_zero():
    for path, leaf in leaf_paths(random_decoder(published("gpt-oss-20b", toy=True))):
        if "norm" in path or path.endswith("bias"):
            assert (leaf == (0 if path.endswith("bias") else 1)).all(), path


def test_rows(decoder):
    heading, row, *others = list(bench("a model", decoder, cases=["forward"], **QUICK))
    assert not others
    assert heading["model"] == "a model"
    assert heading["weights_gb"] == pytest.approx(sum(p.nbytes for p in jax.tree.leaves(decoder)) / 1e9)
    assert heading["tb_per_s"] > 0
    assert isinstance(row, BenchRow)
    assert (row.case, row.tokens) == ("forward", 19)
    assert row.ratio == pytest.approx(row.ms / row.floor_ms)
    assert row.peak_gb > heading["weights_gb"]
    assert row.queued_ms > 0
    # from the cache it is loaded, not compiled
    assert 0 < row.cached_s < row.compile_s
    assert 1 <= row.load <= E / K
    before = jax.config.jax_compilation_cache_dir
    assert before is None, "the cache was the bench's own"
    lines = [*heading_lines(heading), row_line(row.to_dict())]
    assert "a model" in lines[0]
    assert lines[2].split()[:2] == ["case", "T"]
    assert lines[3].split()[:3] == ["forward", "19", f"{row.ms:.2f}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_case_of_every_family(name):
    rows = [r for r in bench(name, random_decoder(published(name, toy=True)), **QUICK) if isinstance(r, BenchRow)]
    assert [r.case for r in rows] == [case.name for case in CASES]
    assert [r.tokens for r in rows] == [23 if case.long else 19 for case in CASES]
    for case, row in zip(CASES, rows, strict=True):
        assert row.failed is None
        assert row.ms > 0
        assert (row.call_ms > 0) == (case.call is not None)
        assert row.targets_per_s == pytest.approx(case.targets / row.ms * 1e3)


def test_what_a_user_calls(decoder):
    """It explains as many targets of as many tokens as the function that is timed beside it."""
    ids = jax.random.randint(jax.random.key(0), (20,), 0, V)
    (case,) = (c for c in CASES if c.name == "AttnLRP 16 targets")
    ours, timed = case.call(LM(decoder), ids.tolist()), case.function(FlatDecoder.of(decoder), ids[None, :-1])
    np.testing.assert_array_equal(ours.token_ids, ids[:-1])
    assert ours.positions.tolist() == list(range(3, 19))
    assert ours.layers.shape == timed.gates.tokens[:, :, 0].shape
    np.testing.assert_array_equal(ours.expert_ids, timed.routes.ids[:, 0])
    (row,) = list(bench("a model", decoder, cases=["AttnLRP 1 target"], **QUICK))[1:]
    assert row.call_ms > 0


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["AttnLRP long"], ["AttnLRP long"]),
        (["long"], [case.name for case in CASES if case.long]),
        (["decode", "forward"], ["forward", "decode a token"]),
    ],
)
def test_which_cases(decoder, monkeypatch, words, names):
    monkeypatch.setattr("moejax.study.bench.run._row", lambda case, *_: BenchRow(case.name, 1))
    assert [row.case for row in list(bench("a model", decoder, cases=words, **QUICK))[1:]] == names


def test_too_little_memory_is_a_row(decoder, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr("moejax.study.bench.run._row", fail)
    _, row, *_ = bench("a model", decoder, cases=["long"], **QUICK)
    assert (row.case, row.tokens, row.failed) == ("AttnLRP long", 23, "out of memory")
    assert "out of memory" in row_line(row.to_dict())


def test_mistakes(decoder):
    with pytest.raises(MoejaxError, match="no case is called 'backward'; there are forward, gradient"):
        next(bench("a model", decoder, cases=["backward"]))
    with pytest.raises(MoejaxError, match="a prompt of 5 tokens is too short to explain its last 16"):
        next(bench("a model", decoder, tokens=5))
    with pytest.raises(MoejaxError, match="no published shape is called 'olmoe-2b'; there are olmoe-1b-7b"):
        published("olmoe-2b")


def test_command(capsys, monkeypatch):
    options = ["--random", "--cases", "forward", "--tokens", "19", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["moejax", "bench", "jetmoe-8b", *options, "--json"])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0
    heading, row = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert heading["model"] == "jetmoe-8b, made small, random"
    assert row["case"] == "forward"
    assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
