"""Devices that share sequences, targets and interventions compute what one computes, and only their share of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny.compare import close
from tiny.four_devices import VOCABULARY, WITH_DATA, decoder, hugging_face, mesh, random_decoder, single, spread

from models.sharding.placement import messages
from moejax import LM, Cell, Continuation, Gates, MoejaxError, Relevance, Span, ablate, explain, explain_batch
from moejax import Backtrace as DLBacktrace
from moejax.dlbacktrace.propagation import LogitRelevanceSeeds
from moejax.generation import generate_tokens
from moejax.models import FlatDecoder, shard
from moejax.models.activations import run_apply
from moejax.models.data_parallel import max_over_devices, shard_map_data, split
from moejax.ops.device import only_experts_split
from moejax.relevance.ablate import _values
from moejax.relevance.budget import Footprint
from moejax.relevance.engine import per_device, relevance
from moejax.relevance.seeds import LogitSeeds
from moejax.rules import AttnLRP, Proportional
from moejax.training.upcycle import MixtureSpec, upcycle

TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (5, 23))
"""A number of sequences that no number of devices divides."""
PROMPTS = [row[:length].tolist() for row, length in zip(TOKENS, (9, 5, 7, 3, 4), strict=True)]
THREE = Continuation((5, 7, 11))


def models(*others: tuple[str, str]) -> pytest.MarkDecorator:
    """Families over layouts; all are slow but the first and these."""
    often = {("olmoe", "data"), *others}
    every = [(f, layout) for f in ("olmoe", "gpt_oss", "jetmoe", "llama", "moejax") for layout in WITH_DATA]
    params = [pytest.param(*m, marks=[] if m in often else pytest.mark.slow) for m in every]
    return pytest.mark.parametrize(("family", "layout"), params)


@models()
def test_logits(family: str, layout: str) -> None:
    ours, theirs = spread(family, layout), single(family)
    close(ours(TOKENS), theirs(TOKENS))
    valid = np.arange(TOKENS.shape[1]) >= np.array([[0], [2], [11], [1], [3]])
    close(ours(TOKENS, valid=valid)[valid], theirs(TOKENS, valid=valid)[valid])
    close(ours(TOKENS[0]), theirs(TOKENS[0]))


@models()
def test_gates(family: str, layout: str) -> None:
    """Gates of one sequence, and gates of all sequences."""
    ours, theirs = spread(family, layout), single(family)
    of_one = Gates.ones(theirs.config, TOKENS)
    assert of_one.tokens is not None
    for gates in (
        Gates(tokens=of_one.tokens.at[1, 3, 17].set(0.0)),
        Gates.ones(theirs.config, TOKENS[0]).drop_head(layer=1, head=2),
    ):
        found, want = ours(TOKENS, gates=gates), theirs(TOKENS, gates=gates)
        close(found, want)
        assert np.abs(want - theirs(TOKENS)).max() > 1e-3


# jetmoe's queries change places between devices of both groups in one exchange, for which both must take each step
@models(("jetmoe", "data and tensor"))
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.9, "num_return_sequences": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "drawn", "beams"],
)
def test_generation(family: str, layout: str, settings: dict) -> None:
    ours, theirs = (
        m.generate_tokens(PROMPTS, max_new_tokens=12, eos_ids=range(30), return_scores=True, seed=5, **settings)
        for m in (spread(family, layout), single(family))
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    close(ours.log_probs, theirs.log_probs)
    if "temperature" in settings:
        assert len(set(np.asarray(theirs.lengths).tolist())) > 1, "devices take different numbers of steps"


@pytest.mark.slow
def test_generation_with_a_time_limit() -> None:
    """The loop then visits the host; devices do not share rows."""
    want = single("olmoe").generate_ids(PROMPTS, max_new_tokens=6)
    assert spread("olmoe", "data").generate_ids(PROMPTS, max_new_tokens=6, max_time=600.0) == want


@models(("olmoe", "data and expert"))
@pytest.mark.parametrize("count", [1, 5])
def test_relevance(family: str, layout: str, count: int) -> None:
    """Relevance in one sequence, whose targets devices divide, and in more sequences than there are devices."""
    ours, theirs = (
        explain_batch(m, PROMPTS[:count], target=THREE, nodes=["attention.1"], chunk=2)
        for m in (spread(family, layout), single(family))
    )
    assert len(ours) == len(theirs) == count
    for mine, other in zip(ours, theirs, strict=True):
        _close(mine, other)


def _close(ours: Relevance, theirs: Relevance) -> None:
    close(ours.layers, theirs.layers)
    close(ours.heads, theirs.heads)
    for mine, other in ((ours.feed_forward, theirs.feed_forward), (ours.attention, theirs.attention)):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            np.testing.assert_array_equal(mine.ids, other.ids)
            close(mine.slots, other.slots)
    for name, vector in theirs.vectors.items():
        close(ours.vectors[name], vector)
    close(ours.ledger.target, theirs.ledger.target)
    assert ours.ledger.leaks.keys() == theirs.ledger.leaks.keys()
    scale = np.abs(theirs.ledger.target).max()
    assert np.abs(ours.ledger.residual).max() <= 1e-5 * scale
    assert [c.id for c in ours.candidates[0]] == [c.id for c in theirs.candidates[0]]


def test_gates_of_single_sequences_in_relevance() -> None:
    """Interventions that differ by sequence reach the device that has it."""
    tokens = jnp.asarray(TOKENS, jnp.int32)
    positions = jnp.full((5, 1), 22, jnp.int32)
    seeds = LogitSeeds.of(positions, jnp.full((5, 1, 1), 3), jnp.ones((5, 1, 1)))
    gates = Gates(tokens=jnp.ones((3, 5, 23)).at[1, 3, 17].set(0.0))
    ours, theirs = (
        relevance(m.flat, tokens, None, seeds, gates, rule=Proportional())
        for m in (spread("olmoe", "data"), single("olmoe"))
    )
    jax.tree.map(close, ours, theirs)


def test_joint_targets() -> None:
    ours, theirs = (explain(m, PROMPTS[0], target=Span((5, 7, 11))) for m in (spread("olmoe", "data"), single("olmoe")))
    _close(ours, theirs)


@models()
def test_interventions(family: str, layout: str) -> None:
    cells = [[Cell.head(0, head) for head in range(2)], *(Cell.token(token) for token in range(4))]
    ours, theirs = (ablate(m, PROMPTS[0], cells=cells, target=THREE) for m in (spread(family, layout), single(family)))
    close(ours, theirs)
    in_parts = ablate(spread(family, layout), PROMPTS[0], cells=cells, target=THREE, chunk=1)
    close(in_parts, theirs)


@pytest.mark.slow
def test_nothing_is_waited_for() -> None:
    """Devices that share what is independent exchange nothing, neither values nor weights."""
    weights = spread("olmoe", "data").flat
    tokens, valid = jnp.ones((4, 9), jnp.int32), jnp.ones((4, 9), bool)
    seeds = LogitSeeds.of(jnp.full((4, 4), 8), jnp.full((4, 4, 1), 3), jnp.ones((4, 4, 1)))
    first = jax.tree.map(lambda leaf: leaf[:1], seeds)
    for program in (
        run_apply.lower(weights, tokens),
        relevance.lower(weights, tokens, None, seeds, Gates(), rule=AttnLRP()),
        relevance.lower(weights, tokens[:1], None, first, Gates(), rule=AttnLRP()),
        jax.jit(lambda t, v: generate_tokens(weights, t, v, jax.random.key(0), max_new_tokens=5)).lower(tokens, valid),
    ):
        assert not list(messages(program.compile()))


def test_a_device_computes_its_share() -> None:
    """As many operations as one device needs for a quarter."""
    one, four = single("olmoe").flat, spread("olmoe", "data").flat
    tokens = jnp.ones((4, 9), jnp.int32)
    seeds = LogitSeeds.of(jnp.full((4, 8), 8), jnp.full((4, 8, 1), 3), jnp.ones((4, 8, 1)))

    def read(weights: FlatDecoder, sequences: int, count: int) -> jax.stages.Lowered:
        some = jax.tree.map(lambda leaf: leaf[:sequences, :count], seeds)
        return relevance.lower(weights, tokens[:sequences], None, some, Gates(), rule=AttnLRP())

    def generate(weights: FlatDecoder, sequences: int) -> jax.stages.Lowered:
        prompts = tokens[:sequences]

        def run(t, v):
            return generate_tokens(weights, t, v, jax.random.key(0), max_new_tokens=5)

        return jax.jit(run).lower(prompts, jnp.ones(prompts.shape, bool))

    def intervene(weights: FlatDecoder, count: int) -> jax.stages.Lowered:
        target = jax.tree.map(lambda leaf: leaf[:1, :2], seeds)
        return _values.lower(weights, tokens[:1], target, {"heads": jnp.zeros((count, 1, 3), jnp.int32)}, Gates())

    for ours, theirs in (
        (generate(four, 4), generate(one, 1)),
        (intervene(four, 8), intervene(one, 2)),
        (read(four, 2, 2), read(one, 1, 2)),
        (run_apply.lower(four, tokens), run_apply.lower(one, tokens[:1])),
        (read(four, 4, 2), read(one, 1, 2)),
        (read(four, 1, 8), read(one, 1, 2)),
    ):
        mine, other = (program.compile().cost_analysis()["flops"] for program in (ours, theirs))
        assert mine == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize(
    ("layout", "sequences", "seeds", "want"),
    [("data", 1, 3, (1, 1)), ("data", 5, 3, (2, 3)), ("data", 4, 3, (1, 3)), ("data and expert", 1, 3, (1, 2))],
)
def test_shares(layout: str, sequences: int, seeds: int, want: tuple[int, int]) -> None:
    assert per_device(spread("olmoe", layout).config, sequences, seeds) == want
    assert per_device(single("olmoe").config, sequences, seeds) == (sequences, seeds)


def test_a_bound_on_memory_is_a_device_s() -> None:
    """Four devices explain with what one of them needs for a quarter of the targets."""
    target = Continuation((5, 7, 11, 13))
    four, one = spread("olmoe", "data"), single("olmoe")
    footprint = Footprint.of(one.config, batch=1, tokens=12, itemsize=4)
    bound = footprint.kept(0) + footprint.target + footprint.readout
    explain(four, PROMPTS[0], target=target, max_bytes=bound, rematerialise=False)


def test_weights_that_lie_along_data_are_not_shared_out() -> None:
    """A rule may split them over an axis of any name."""
    model = LM(shard(decoder("olmoe"), mesh("data"), {"hidden": "data"}))
    assert model.config.mesh is None
    close(model(TOKENS), single("olmoe")(TOKENS))


@pytest.mark.parametrize("layout", WITH_DATA)
def test_kernels_are_whole_where_devices_share(layout: str) -> None:
    """XLA splits by the axis what runs outside of the map, and nothing within."""
    over = spread("olmoe", layout).config.mesh
    assert over is not None
    within = []

    def run(x: jax.Array) -> jax.Array:
        within.append(only_experts_split(over))
        return x

    jax.eval_shape(lambda x: shard_map_data(run, over, (x,), (split(0),), split(0)), jnp.zeros(4))
    assert within == [layout != "data and tensor"]
    assert not only_experts_split(over)


@pytest.mark.parametrize(("layout", "want"), [("data", [3, 1, 4, 2]), ("data and tensor", [4, 2, 4, 2])])
def test_devices_agree_where_they_meet_over_other_axes(layout: str, want: list[int]) -> None:
    """On the largest number; where nothing else is split each goes its own way."""
    over = spread("olmoe", layout).config.mesh
    run = jax.jit(lambda x: shard_map_data(jax.vmap(max_over_devices), over, (x,), (split(0),), split(0)))
    assert run(jnp.array([3, 1, 4, 2])).tolist() == want


@pytest.mark.parametrize("family", ["jetmoe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("olmoe", "gpt_oss"))])
@pytest.mark.parametrize("layout", ["data and tensor", "both"])
def test_branches_exchange_within_groups(family: str, layout: str) -> None:
    """Groups of devices choose capacities of their own. A permutation would wait for those that took another branch."""
    weights, tokens = spread(family, layout).flat, jnp.ones((4, 27), jnp.int32)
    seeds = LogitSeeds.of(jnp.full((4, 1), 8), jnp.full((4, 1, 1), 3), jnp.ones((4, 1, 1)))
    program = relevance.lower(weights, tokens, None, seeds, Gates(), rule=AttnLRP()).compile().as_text()
    assert program is not None
    lines = [line for line in program.splitlines() if "channel_id=" in line and "branch_" in line]
    assert lines or family != "jetmoe", "nothing is exchanged in a branch"
    assert all("replica_groups=[2,2]<=[4]" in line for line in lines)


@pytest.mark.parametrize("layout", WITH_DATA)
def test_devices_that_the_caller_maps_over(layout: str) -> None:
    """Within a map over ``data`` of one's own nothing is shared out again."""
    model, tokens = spread("olmoe", layout), TOKENS[:4]
    seeds = LogitSeeds.of(jnp.full((4, 1), 22), jnp.full((4, 1, 1), 3), jnp.ones((4, 1, 1)))

    def run(weights: FlatDecoder, tokens: jax.Array, seeds: LogitSeeds) -> tuple[jax.Array, ...]:
        read = relevance(weights, tokens, None, seeds, Gates(), rule=AttnLRP())
        new = generate_tokens(weights, tokens, tokens >= 0, jax.random.key(0), max_new_tokens=3)
        return run_apply(weights, tokens)[0], read.target, new.tokens

    mine = jax.shard_map(
        run,
        mesh=model.config.mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
    )
    arguments = jnp.asarray(tokens, jnp.int32), seeds
    found, want = jax.jit(mine)(model.flat, *arguments), run(single("olmoe").flat, *arguments)
    jax.tree.map(close, found, want)


@pytest.mark.slow
def test_sequences_that_compete_stay_together() -> None:
    """Devices share seeds and interventions, which do not, and each makes the forward pass of all sequences."""
    fields = hugging_face("moejax", moe="expert_choice", moe_args={})
    one = LM(random_decoder(fields))
    four = LM(shard(one.decoder, mesh("data")))
    want = one(TOKENS)
    assert np.abs(want[0] - one(TOKENS[:1])[0]).max() > 1e-3
    close(four(TOKENS), want)
    new = [m.generate_ids(PROMPTS, max_new_tokens=4) for m in (four, one)]
    assert new[0] == new[1]
    cells = [Cell.head(0, head) for head in range(5)]
    for mine, other in zip(*(explain_batch(m, PROMPTS[:2], target=THREE) for m in (four, one)), strict=True):
        _close(mine, other)
    close(*(ablate(m, PROMPTS[0], cells=cells) for m in (four, one)))
    seeds = LogitSeeds.of(jnp.full((5, 3), 22), jnp.full((5, 3, 1), 3), jnp.ones((5, 3, 1)))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    read = [relevance(m.flat, tokens, None, seeds, Gates(), rule=AttnLRP()) for m in (four, one)]
    jax.tree.map(partial(close, tolerance=1e-4), *read)


def test_what_broadcasts_over_sequences() -> None:
    """One row of padding for all of them; not some rows for each device's."""
    ours, theirs = spread("olmoe", "data"), single("olmoe")
    valid = np.arange(TOKENS.shape[1])[None] >= 3
    close(ours(TOKENS, valid=valid)[:, 3:], theirs(TOKENS, valid=valid)[:, 3:])
    rows, of_some = jnp.ones((8, 5), jnp.int32), jnp.ones((2, 5), bool)
    with pytest.raises(MoejaxError, match="have lengths 2, 8: give one length, or 1"):
        generate_tokens(ours.flat, rows, of_some, jax.random.key(0), max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generation", "multi-class classification"])
def test_backtrace(task: str) -> None:
    """Seeds of any kind: a logit of each new token, and given relevance of all logits as one."""
    found, want = (
        DLBacktrace(model=m).run_task(task, inputs=PROMPTS[:1], max_new_tokens=3, return_relevance=True)
        for m in (spread("olmoe", "data"), single("olmoe"))
    )
    np.testing.assert_array_equal(found["generated_ids"], want["generated_ids"])
    for mine, other in zip(found["relevance_trace"], want["relevance_trace"], strict=True):
        jax.tree.map(close, mine["all_wt"], other["all_wt"])


@pytest.mark.slow
def test_one_start_is_one_pass_back() -> None:
    """Given relevance of logits at many positions, which is what Backtrace starts from, is one target."""
    for model in (single("olmoe"), spread("olmoe", "data")):
        start = LogitRelevanceSeeds(jnp.arange(9)[None], jnp.ones((1, 9, VOCABULARY)))
        tokens = jnp.asarray(TOKENS[:1, :9], jnp.int32)
        found = relevance(model.flat, tokens, None, start, Gates(), rule=Proportional())
        assert found.gates.tokens is not None
        assert found.gates.tokens.shape == (1, 3, 1, 9)


def test_axes_under_other_rules_and_a_mesh_that_is_set() -> None:
    """No experts lie along ``expert``, and the mesh of the context is the model's."""
    over = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = LM(shard(decoder("olmoe"), over, {"hidden": "expert"}))
    with jax.set_mesh(over):
        found = model(TOKENS)
    close(found, single("olmoe")(TOKENS))


def test_what_is_upcycled_over_data_is_published() -> None:
    fields = hugging_face("llama", attention_bias=False, mlp_bias=False)
    dense = random_decoder(fields)
    spec, key = MixtureSpec(4, 2), jax.random.key(0)
    theirs = upcycle(LM(dense), spec, key=key).model
    ours = upcycle(LM(shard(dense, mesh("data"))), spec, key=key).model
    assert theirs.hugging_face is not None
    assert ours.hugging_face == theirs.hugging_face
    close(ours(TOKENS), theirs(TOKENS))
