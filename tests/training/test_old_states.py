"""Training states that version 0.1.0 wrote: lists of leaves, in the order of the names that leaves had then."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from tiny.hugging_face import fields

from moejax.checkpoints.plan import leaf_paths
from moejax.models import Decoder, family
from moejax.training import StateStore, TrainState

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

OLD_LAYERS = [
    "layers.0.attention.output.weight",
    "layers.0.attention.query_key_value.bias",
    "layers.0.attention.query_key_value.weight",
    "layers.0.attention_norm.weight",
    "layers.0.feed_forward.input",
    "layers.0.feed_forward.output",
    "layers.0.feed_forward_norm.weight",
    "layers.1.attention.output.weight",
    "layers.1.attention.query_key_value.bias",
    "layers.1.attention.query_key_value.weight",
    "layers.1.attention_norm.weight",
    "layers.1.feed_forward.down",
    "layers.1.feed_forward.gate_up",
    "layers.1.feed_forward.router.linear.weight",
    "layers.1.feed_forward.shared.gate.weight",
    "layers.1.feed_forward.shared.mlp.input",
    "layers.1.feed_forward.shared.mlp.output",
    "layers.1.feed_forward_norm.weight",
]
"""The leaves of a Qwen2-MoE's layers as version 0.1.0 listed them."""

TODAY = {
    "layers.0.feed_forward.input": "layers.0.feed_forward.gate_up",
    "layers.0.feed_forward.output": "layers.0.feed_forward.down",
    "layers.1.feed_forward.down": "layers.1.feed_forward.experts.down",
    "layers.1.feed_forward.gate_up": "layers.1.feed_forward.experts.gate_up",
    "layers.1.feed_forward.router.linear.weight": "layers.1.feed_forward.router.weight",
    "layers.1.feed_forward.shared.gate.weight": "layers.1.feed_forward.shared.router.weight",
    "layers.1.feed_forward.shared.mlp.input": "layers.1.feed_forward.shared.mlp.gate_up",
    "layers.1.feed_forward.shared.mlp.output": "layers.1.feed_forward.shared.mlp.down",
}
OLD_ORDER = ["embedding", "head", *(TODAY.get(name, name) for name in OLD_LAYERS), "norm.weight"]


def test_a_list_of_leaves_in_the_old_order_is_read(tmp_path: Path) -> None:
    """All leaves have the same few numbers of their own, so one in another's place shows, even if its shape fits."""
    config = family("qwen2_moe").config(fields("qwen2_moe", num_hidden_layers=2))
    decoder = Decoder.init(config, jax.random.key(0))
    state = TrainState(decoder, optax.trace(0.9).init(decoder), jnp.int32(5))
    numbered = [jnp.full_like(leaf, i) for i, (_, leaf) in enumerate(leaf_paths(state))]
    state = jax.tree.unflatten(jax.tree.structure(state), numbered)
    by_path = dict(leaf_paths(state))
    start = [path.removesuffix("embedding") for path in by_path if path.endswith("embedding")]
    assert len(start) == 2, "the decoder and its momenta"
    listed = [by_path[before + name] for before in start for name in OLD_ORDER]
    others = [path for path in by_path if not path.startswith(tuple(start))]
    assert list(by_path)[-len(others) :] == others
    listed += [by_path[path] for path in others]
    assert len(listed) == len(by_path)
    with ocp.CheckpointManager(tmp_path.absolute()) as manager:
        manager.save(5, args=ocp.args.StandardSave(listed))
    restored = StateStore(tmp_path).restore(jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
