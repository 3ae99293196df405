"""The drop-top-k probe against whole passes, one a layer, and what must not be asked of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import LM, Gates, MoejaxError
from moejax.rules import Reading
from moejax.study import Documents, Windows, analyse, drop_top

L, E, K = 2, 9, 5


@pytest.fixture(scope="module")
def windows() -> Windows:
    rng = np.random.default_rng(3)
    return Windows(Documents([rng.integers(2, 53, n) for n in (32, 19)], np.array([0, 1]), ("a", "b")), 32, 2)


def by_whole_passes(lm: LM, windows: Windows, dropped: int, refill: bool) -> float:
    """The loss with gates found from the bottom up: a whole pass to learn each layer's."""
    (batch,) = windows
    gate = jnp.ones((L, *batch.tokens.shape, E))
    run = jax.jit(lambda gates: lm.decoder.hidden(batch.tokens, valid=batch.valid, reading=Reading(gates=gates)))

    def interventions():
        return Gates(selectable=gate) if refill else Gates(routing_weights=gate)

    for layer in range(L):
        best = run(interventions()).routing()[layer].ids[..., :dropped]
        gate = gate.at[layer].set(1 - jax.nn.one_hot(best, E).sum(-2))
    hidden = run(interventions())
    p = np.asarray(jax.nn.log_softmax(lm.decoder.logits(hidden.stream)), np.float64)
    picked = np.take_along_axis(p, np.asarray(batch.targets)[..., None], -1)[..., 0]
    return float(-picked[np.asarray(batch.predicted)].mean())


@pytest.mark.parametrize(("dropped", "refill"), [(4, True), (1, False)])
def test_against_whole_passes(toy_lm: LM, windows: Windows, dropped: int, refill: bool) -> None:
    want = by_whole_passes(toy_lm, windows, dropped, refill)
    found = drop_top(toy_lm, windows, dropped, refill=refill)
    assert found.loss == pytest.approx(want, rel=1e-5)
    assert found.predictions == windows.num_tokens - 2
    assert found.loss != pytest.approx(found.intact, rel=1e-3)


def test_analysis_makes_every_probe_there_is(toy_lm: LM, windows: Windows) -> None:
    found = analyse(toy_lm, windows, drop=1)
    assert [(p.dropped, p.refill) for p in found.probes] == [(1, True), (1, False)]
    assert found.probes[0].intact == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("dropped", "refill", "words"),
    [(0, True, "at least 1"), (5, True, "at most 4"), (5, False, "at most 4"), (9, True, "at most 4")],
)
def test_no_expert_left(toy_lm: LM, windows: Windows, dropped: int, refill: bool, words: str) -> None:
    with pytest.raises(MoejaxError, match=words):
        drop_top(toy_lm, windows, dropped, refill=refill)
    if dropped:
        with pytest.raises(MoejaxError, match="at most 4"):
            analyse(toy_lm, windows, drop=dropped)
