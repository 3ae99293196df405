"""Read values at nodes, patch them from another prompt, and steer: what TransformerLens and nnsight do with hooks."""

import jax
import jax.numpy as jnp
import numpy as np

import moejax

lm = moejax.load("tiny-olmoe")
prompt, other = "And Moses said unto the LORD", "And David said unto the LORD"

# which nodes there are
table = moejax.nodes(lm)
print(table)

# read: cache = {"stream.0": [B, T, D], ..}
logits, cache = lm.run_with_cache(
    prompt, names=["stream", "router_logits", "expert_ids", "expert_outputs.3", "heads.1"]
)
assert cache["stream.2"].shape == (1, len(lm.encode(prompt)), lm.config.model_dim)
last = lm.config.num_layers
np.testing.assert_allclose(lm.decoder.logits(cache[f"stream.{last}"]), logits, atol=2e-2)  # a logit lens for any layer

# patch the last token's stream from another prompt, at each layer: how much of the difference has arrived there
theirs, source = lm.run_with_cache(other, names=["stream"])
for layer in range(last + 1):
    patched = lm(lm.encode(prompt), edits=moejax.Edits().patch(source, [f"stream.{layer}"], tokens=[-1]))
    print(layer, float(jnp.abs(patched[0, -1] - logits[0, -1]).max()))
assert np.allclose(patched[0, -1], theirs[0, -1], atol=1e-3), "the last one is the other run"

# steer: add a vector at a layer, for every new token too
direction = source["stream.2"][0, -1] - cache["stream.2"][0, -1]
steer = moejax.Edits().add("stream.2", direction)
print(lm.generate(prompt, max_new_tokens=8), "|", lm.generate(prompt, max_new_tokens=8, edits=steer))

# intervene on the router: expert 5 of layer 3 wins wherever 9 more suffice; on an expert: its output is halved
routed = moejax.Edits().add("router_logits.3", 9.0, experts=[5])
_, seen = lm.run_with_cache(prompt, names=["expert_ids.3"], edits=routed)
assert (seen["expert_ids.3"] == 5).any(-1).mean() > (cache["expert_ids.3"] == 5).any(-1).mean()
halved = lm(lm.encode(prompt), edits=moejax.Edits().scale("expert_outputs.3", 0.5, experts=[5]))


# one function for jit, grad and vmap: the gradient of a logit by a vector that is added at every position, one by one
tokens, best = jnp.asarray([lm.encode(prompt)]), int(logits[0, -1].argmax())


def logit(vector: jax.Array, position: jax.Array) -> jax.Array:
    """The logit of the most likely next token if ``vector`` is added to the stream at ``position``."""
    edits = moejax.Edits().add("stream.1", vector, tokens=position)
    found, _ = moejax.apply(lm.decoder, tokens, edits=edits)
    return found[0, -1, best]


positions = jnp.arange(tokens.shape[1])
gradients = jax.jit(jax.vmap(jax.grad(logit), (None, 0)))(jnp.zeros(lm.config.model_dim), positions)
assert gradients.shape == (tokens.shape[1], lm.config.model_dim)
print(jnp.linalg.norm(gradients, axis=-1))
