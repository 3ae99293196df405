"""How the next token is drawn from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moejax.errors import MoejaxError


@dataclass(frozen=True)
class Sampling:
    """Greedy by default; with a temperature, a draw from the tempered softmax over the tokens that the limits keep.

    Attributes:
        temperature: zero is greedy.
        top_k: keep the ``top_k`` best tokens, and those tied with the last of them; zero keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches ``top_p``.

    Raises:
        MoejaxError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise MoejaxError(f"{self}: needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1.")

    def draw(self, logits: Float[Array, "B V"], key: PRNGKeyArray) -> Int[Array, " B"]:
        """One token for each row."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, self.limited(logits), axis=-1)

    def limited(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Tempered logits, minus infinity where top-k (first) or top-p (on what is left) leaves a token out."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            last_kept = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < last_kept, -jnp.inf, logits)
        if self.top_p < 1:
            order = jnp.argsort(-logits, axis=-1)
            best_first = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
            before = jnp.cumsum(best_first, axis=-1) - best_first
            outside = jnp.zeros_like(logits, bool).at[jnp.arange(len(logits))[:, None], order].set(before >= self.top_p)
            logits = jnp.where(outside, -jnp.inf, logits)
        return logits
