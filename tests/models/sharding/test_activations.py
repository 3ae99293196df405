"""Values at nodes and edits over four devices equal those on one."""

import numpy as np
import pytest
from tiny.compare import close
from tiny.four_devices import MODEL, VOCABULARY, single, spread

from moejax import Edits, explain
from moejax.models.node_table import nodes

TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))

OTHERS = [("jetmoe", "both"), ("moejax", "expert"), ("olmoe", "tensor")]
MODELS = [("olmoe", "data and expert"), *(pytest.param(*m, marks=pytest.mark.slow) for m in OTHERS)]


@pytest.mark.parametrize(("family", "layout"), MODELS)
def test_values_and_edits(family: str, layout: str) -> None:
    rng = np.random.default_rng(1)
    edits = (
        Edits()
        .add("stream.1", rng.normal(size=(2, 1, MODEL)), tokens=[3, -1])
        .scale("expert_outputs.0", 0.3, experts=[1, 5])
        .add("neurons.1", 0.2, experts=[2, 6])
        .add("router_logits.1", 1.5, experts=[7])
    )
    one, four = single(family), spread(family, layout)
    logits, values = one.run_with_cache(TOKENS, names="*", edits=edits)
    got, read = four.run_with_cache(TOKENS, names="*", edits=edits)
    close(got, logits)
    assert list(read) == nodes(one).names
    for name, value in values.items():
        close(read[name], value)
    if family == "olmoe":
        prompt, found = TOKENS[0].tolist(), ["expert_outputs.0", "neurons.1"]
        edits = Edits(edits.edits[1:])  # but the value that differs by sequence
        want = explain(one, prompt, edits=edits, nodes=found)
        ours = explain(four, prompt, edits=edits, nodes=found)
        close(ours.tokens, want.tokens)
        for name in found:
            close(ours.vectors[name], want.vectors[name])
