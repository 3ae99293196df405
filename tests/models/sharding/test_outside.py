"""A family from a file outside of the package is divided among devices by the roles that its parts name."""

import jax
import numpy as np
import pytest
from design import outside
from tiny.compare import close
from tiny.four_devices import LAYOUTS, mesh, random_decoder

from moejax import LM, explain
from moejax.models import shard

PROMPT = [5, 17, 3, 80, 42, 9, 61]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_generation_and_relevance(layout: str) -> None:
    with outside.registered():
        from design.outside.latent import tiny

        whole = random_decoder(tiny())
        one, four = LM(whole), LM(shard(whole, mesh(layout), LAYOUTS[layout][1]))
        split = [leaf for leaf in jax.tree.leaves(four.decoder) if not leaf.sharding.is_fully_replicated]
        assert split
        close(four(np.asarray([PROMPT])), one(np.asarray([PROMPT])))
        assert four.generate_ids([PROMPT], max_new_tokens=12) == one.generate_ids([PROMPT], max_new_tokens=12)
        close(explain(four, PROMPT).tokens, explain(one, PROMPT).tokens)
