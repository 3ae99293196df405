"""The values at nodes of a decoder: one forward pass, read by taps that hand back what they see."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.models.decoder import Decoder
from moejax.rules import Reading


@jax.custom_vjp
def _seen(x: Array, tap: Array) -> Array:
    """``x``; the cotangent of ``tap`` is ``x`` itself, whatever comes from behind."""
    return x


_seen.defvjp(lambda x, tap: (x, (x, tap)), lambda saved, c: (c, saved[0].astype(saved[1].dtype)))


class _Recording(Reading):
    """A reading whose taps are read as the values at their nodes."""

    def tap(self, name: str, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return _seen(x, self.taps[name]) if name in self.taps else x


jax.tree_util.register_dataclass(_Recording, data_fields=["gates", "probes", "taps"], meta_fields=["rule"])


def record(
    decoder: Decoder, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"] | None, nodes: Sequence[str]
) -> tuple[dict[str, Float[Array, "B T D"]], Float[Array, "B T D"]]:
    """The values at ``nodes``, in float32 or wider, and the residual stream after the last layer.

    Nothing is propagated back: what the taps hand back does not depend on it, so the compiler leaves it out.

    Args:
        nodes: names such as ``"feed_forward.3"``, of nodes that are as wide as the model.
    """
    shape = (*tokens.shape, decoder.config.model_dim)
    dtype = jnp.promote_types(decoder.embedding.dtype, jnp.float32)
    taps = {node: jnp.zeros(shape, dtype) for node in nodes}

    def run(taps: dict[str, Array]) -> tuple[Array, Array]:
        stream = decoder.hidden(tokens, valid=valid, reading=_Recording(taps=taps)).stream
        return stream.astype(dtype).sum(), stream

    return jax.grad(run, has_aux=True)(taps)
