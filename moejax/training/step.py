"""The train step: parameters in float32, compute in any dtype, many steps to a program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from moejax.models import Decoder
from moejax.training.data import windows
from moejax.training.losses import LossWeights, language_model_loss


class TrainState(NamedTuple):
    """All that a run needs to go on: weights, optimiser state, steps done."""

    decoder: Decoder
    optimiser: optax.OptState
    step: Int[Array, ""]


TrainSteps = Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]


def make_train_steps(
    optimiser: optax.GradientTransformation,
    *,
    batch: int,
    length: int,
    count: int,
    seed: int,
    weights: LossWeights = LossWeights(),
    compute_dtype: DTypeLike = jnp.float32,
) -> TrainSteps:
    """A compiled function of (state, corpus tokens) that runs ``count`` steps and returns their metrics, stacked.

    The windows of a step depend on ``seed`` and the step's number alone, so that a resumed run sees the same data.
    """

    def loss(decoder: Decoder, batch_windows: Array) -> tuple[Array, dict[str, Array]]:
        cast = jax.tree.map(lambda p: p.astype(compute_dtype), decoder)
        return language_model_loss(cast, batch_windows, weights)

    def one_step(tokens: Array, state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch_windows = windows(tokens, key, batch, length + 1)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.decoder, batch_windows)
        # optax types its trees as nested containers of arrays; a module is one all the same
        parameters: Any = state.decoder
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, parameters)
        decoder: Any = optax.apply_updates(parameters, updates)
        metrics["gradient_norm"] = optax.global_norm(gradient)
        return TrainState(decoder, optimiser_state, state.step + 1), metrics

    @partial(jax.jit, donate_argnums=0)
    def train_steps(state: TrainState, tokens: Array) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(partial(one_step, tokens), state, None, length=count)

    return train_steps
