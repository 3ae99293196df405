"""Experts that are modules lie on their devices whole, and compute there what they do on one."""

import jax
import numpy as np
from layers.modules import ModuleMoE
from tiny.compare import close
from tiny.four_devices import LAYOUTS, hugging_face, mesh, random_decoder

from moejax import LM, explain, register_moe
from moejax.checkpoints.plan import leaf_paths
from moejax.layers import LAYERS
from moejax.models import shard
from moejax.training import LossWeights, language_model_loss

PROMPT = [5, 17, 3, 80, 42, 9, 61]


def test_logits_relevance_and_gradients() -> None:
    with LAYERS.restored():
        register_moe("modules")(ModuleMoE)
        whole = random_decoder(hugging_face("moejax", moe="modules", moe_args={}))
        one, four = LM(whole), LM(shard(whole, mesh("both"), LAYOUTS["both"][1]))
        kernel = four.decoder.layers[0].feed_forward.experts.weights["up.kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[0] == 4
        close(four(np.asarray([PROMPT])), one(np.asarray([PROMPT])))
        ours, want = explain(four, PROMPT), explain(one, PROMPT)
        close(ours.tokens, want.tokens)
        close(ours.ledger.leaks["expert"], want.ledger.leaks["expert"])
        tokens = np.asarray([PROMPT, PROMPT[::-1]])
        gradient = jax.jit(jax.grad(lambda d: language_model_loss(d, tokens, LossWeights())[0]))
        both = zip(leaf_paths(gradient(four.decoder)), jax.tree.leaves(gradient(one.decoder)), strict=True)
        for (path, found), expected in both:
            assert np.abs(found).max() > 0, path
            close(found, expected)
