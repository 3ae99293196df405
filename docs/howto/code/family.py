"""A model family: how its ``config.json`` maps to a ``Config``, and where its checkpoints hold each leaf.

``model_type`` is ``example_moe``: experts have names of their own in the files, and routing weights sum to one.
"""

from moejax.layers import GLU, BlockConfig, MixtureConfig, RouterConfig
from moejax.models import Config, Fields, register_family
from moejax.models.families._shared import GROUPED_QUERY, LAYER, OUTER, grouped_query
from moejax.models.keys import KeyTable, per_expert, whole
from moejax.models.kinds import ACTIVATION, EPSILON

EXPERT = LAYER + "moe.experts.{expert}."

KEYS: KeyTable = {
    **OUTER,
    **GROUPED_QUERY,
    "layers.{layer}.feed_forward.router.weight": [whole(LAYER + "moe.router.weight")],
    "layers.{layer}.feed_forward.experts.gate_up": [per_expert(EXPERT + "w1.weight", EXPERT + "w3.weight")],
    "layers.{layer}.feed_forward.experts.down": [per_expert(EXPERT + "w2.weight")],
}
"""From a leaf's path to the tensors that hold it; one table for reading and writing."""


@register_family("example_moe", KEYS)
def config(fields: Fields) -> Config:
    """Map the fields. A field that is set and that nobody reads is an error, unless it cannot change the model."""
    dim, eps = fields.size("hidden_size"), fields("rms_norm_eps", EPSILON, 1e-5)
    attention = grouped_query(fields, eps, qk_norm="head")
    router = RouterConfig(
        num_experts=fields.size("num_experts"),
        num_selected=fields.size("num_experts_per_tok"),
        weigh="renormalised",
    )
    glu = GLU(fields("hidden_act", ACTIVATION, "silu"))
    mixture = MixtureConfig(dim, fields.size("moe_intermediate_size"), router, glu)
    fields.must_be("attention_bias", False)
    return Config(
        model_type="example_moe",
        blocks=(BlockConfig(attention, mixture, eps),) * fields.size("num_hidden_layers"),
        norm_eps=eps,
        **fields.common(max_positions=4096),
    )


if __name__ == "__main__":
    import json
    import tempfile
    from pathlib import Path

    import jax
    import numpy as np
    from safetensors.numpy import save_file

    import moejax
    from moejax.models import Decoder, family

    published = {
        "model_type": "example_moe",
        "vocab_size": 53,
        "hidden_size": 48,
        "moe_intermediate_size": 14,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_experts": 9,
        "num_experts_per_tok": 5,
    }
    # a folder as a publisher would write it: here with random numbers under the names of the key table
    mapping = family("example_moe")
    decoder = Decoder.abstract(mapping.config(published))
    generator, tensors = np.random.default_rng(0), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(decoder):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        source = mapping.keys[name.replace(f"layers.{layer}.", "layers.{layer}.")][-1]
        for key, shape in source(leaf.shape).in_layer(layer).tensors:
            tensors[key] = generator.normal(0, 0.2, shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(published))
        lm = moejax.load(folder, dtype="float32")
        relevance = moejax.explain(lm, [3, 1, 4, 15, 9, 2, 6])
        print(relevance.ledger)
        assert abs(relevance.ledger.residual[0]) < 1e-4 * max(1.0, abs(relevance.ledger.target[0]))
