"""The train step: parameters in float32, compute in any dtype, many steps to a program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from moejax.errors import ConfigError
from moejax.models import Decoder
from moejax.program import Program
from moejax.training.data import windows
from moejax.training.losses import LossWeights, Parts, language_model_loss


class TrainState(NamedTuple):
    """All that a run needs to go on: weights, optimiser state, steps done."""

    decoder: Decoder
    optimiser: optax.OptState
    step: Int[Array, ""]

    @classmethod
    def start(cls, decoder: Decoder, optimiser: optax.GradientTransformation) -> "TrainState":
        """The state before the first step, laid over devices as the decoder is."""
        parameters: Any = decoder
        return cls(decoder, optimiser.init(parameters), jnp.zeros((), jnp.int32))


TrainSteps = Callable[[TrainState, Array], tuple[TrainState, Parts]]


def make_train_steps(
    optimiser: optax.GradientTransformation,
    *,
    batch: int,
    length: int,
    count: int,
    seed: int,
    weights: LossWeights = LossWeights(),
    compute_dtype: DTypeLike = jnp.float32,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> TrainSteps:
    """A compiled function that runs ``count`` steps.

    It takes a :class:`TrainState`, whose memory it takes over (the state is donated), and the tokens of the corpus
    ``[n]``. It returns the state after the steps and their metrics, stacked along a leading axis of steps. The windows
    of a step depend on ``seed`` and the step's number alone, so that a resumed run sees the same data.

    Args:
        optimiser: updates the float32 weights.
        batch, length: sequences of a step, and their tokens.
        weights: how auxiliary losses enter the total.
        compute_dtype: dtype of the forward and backward pass.
        accumulate: micro-batches into which a step's ``batch`` is cut; their gradients are averaged. Balance is then
            computed for each micro-batch, while :meth:`Mixture.after_step` sees means over all of them.
        mesh: devices; sequences are divided among its axis ``data``. The weights lie where the state has them.

    Raises:
        ConfigError: micro-batches or devices that do not divide the batch.
    """
    num_shards = 1 if mesh is None else mesh.shape.get("data", 1)
    if batch % (accumulate * num_shards):
        raise ConfigError(f"batch={batch} is no multiple of {accumulate} micro-batches times {num_shards} devices.")
    rows = None if mesh is None else NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.shape else None))

    gradient = _accumulated(_gradient(weights, compute_dtype, rows), accumulate)

    def one_step(tokens: Array, state: TrainState, _: None) -> tuple[TrainState, Parts]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch_windows = windows(tokens, key, batch, length + 1)
        gradients: Any
        gradients, metrics = gradient(state.decoder, batch_windows, jax.random.fold_in(key, 1))
        # optax types its trees as nested containers of arrays; a module is one all the same
        parameters: Any = state.decoder
        updates, optimiser_state = optimiser.update(gradients, state.optimiser, parameters)
        decoder: Any = optax.apply_updates(parameters, updates)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        return TrainState(after_step(decoder, metrics), optimiser_state, state.step + 1), metrics

    @partial(Program, donate_argnums=0)
    def train_steps(state: TrainState, tokens: Array) -> tuple[TrainState, Parts]:
        return jax.lax.scan(partial(one_step, tokens), state, None, length=count)

    return train_steps


Gradient = Callable[[Decoder, Array, Array], tuple[Decoder, Parts]]


def _gradient(weights: LossWeights, compute_dtype: DTypeLike, rows: NamedSharding | None) -> Gradient:
    """The gradient of the language-model loss and its metrics; ``rows`` is the placement of the batch."""

    def loss(decoder: Decoder, batch_windows: Array, key: Array) -> tuple[Array, Parts]:
        cast = jax.tree.map(lambda p: p.astype(compute_dtype), decoder)
        return language_model_loss(cast, batch_windows, weights, key)

    def gradient(decoder: Decoder, batch_windows: Array, key: Array) -> tuple[Decoder, Parts]:
        if rows is not None:
            batch_windows = jax.lax.with_sharding_constraint(batch_windows, rows)
        return jax.grad(loss, has_aux=True)(decoder, batch_windows, key)

    return gradient


def _accumulated(gradient: Gradient, accumulate: int) -> Gradient:
    """``gradient`` of a batch as the mean over its micro-batches, as are the metrics."""
    if accumulate == 1:
        return gradient

    def mean(decoder: Decoder, batch_windows: Array, key: Array) -> tuple[Decoder, Parts]:
        parts = batch_windows.reshape(accumulate, -1, batch_windows.shape[-1])

        def add(total, part):
            return (jax.tree.map(jnp.add, total, gradient(decoder, *part)), None)

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, decoder, parts[0], key))
        total, _ = jax.lax.scan(add, zeros, (parts, jax.random.split(key, accumulate)))
        return jax.tree.map(lambda x: x / accumulate, total)

    return mean


def after_step(decoder: Decoder, metrics: Parts) -> Decoder:
    """The decoder with what its mixtures change outside of the gradient (:meth:`moejax.layers.Mixture.after_step`)."""
    config = decoder.config
    mixtures = [i for i in range(config.num_layers) if config.blocks[i].half("feed_forward").sizes.num_experts]
    moved = jax.tree.map(lambda leaf: leaf, decoder)
    for row, i in enumerate(mixtures):
        info = {name: values[row] for name, values in metrics.items() if values.shape[:1] == (len(mixtures),)}
        mixture: Any = decoder.layers[i].feed_forward
        moved.layers[i].feed_forward = mixture.after_step(info["load"], info)
    return moved
