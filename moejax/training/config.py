"""Settings of a training run, as one JSON file holds them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from moejax.errors import ConfigError
from moejax.layers import LAYERS
from moejax.models import Config, Decoder, family, shard
from moejax.training.losses import LossWeights


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Relative paths start at the process's working directory.

    Attributes:
        model: fields of the decoder's config, named as in Hugging Face configs. ``model_type`` is ``moejax`` by
            default (``moejax/models/families/moejax.py`` lists its fields), ``vocab_size`` the tokenizer's size.
        data: file to train on: a corpus (``.npz``) or texts (``.jsonl`` or plain text, see
            :func:`moejax.training.texts.read_texts`). ``"sample"`` names the text that is bundled with moejax.
        heldout: file for the held-out loss, in the same formats. By default the end of ``data`` is held out.
        heldout_share: how much of ``data`` is held out where ``heldout`` is not given; a fraction of its tokens.
        heldout_tokens: the held-out loss reads at most this many tokens.
        tokenizer: a ``tokenizer.json``. By default the file beside an ``.npz`` corpus, else the tokenizer of the
            bundled model ``tiny-olmoe``.
        steps: optimiser steps of the run.
        batch: sequences in a step.
        length: tokens of a sequence.
        accumulate: micro-batches into which a step's batch is cut.
        learning_rate: peak of the learning rate, reached after ``warmup`` steps. The rate then falls along a cosine to
            a twentieth of the peak.
        weight_decay: AdamW's decay of matrices; the embedding, biases and vectors are not decayed.
        warmup: steps of linear warm-up, at most a tenth of the run.
        clip: gradients with a larger global norm are scaled down to this norm.
        compute_dtype: dtype of the forward and the backward pass; parameters are kept in float32.
        balance_loss_coef, router_z_loss_coef: weights of the two auxiliary losses of every mixture. By default those of
            :class:`moejax.training.LossWeights`, and for a registered layer its own.
        reduce_layers: ``reduce`` of the same.
        log_every: steps between two rows of metrics; the last row may have fewer.
        save_every: steps between two saved states, each saved with the next row, and the last at the end; each save
            also computes the held-out loss.
        seed: seed of the initial weights and of the data's order.
        logger: where metrics go beside the files in the run's folder: ``"wandb"``, Weights & Biases, if it is
            installed. Its own environment variables (``WANDB_PROJECT``, ``WANDB_MODE``) hold.
        mesh: sizes of the mesh axes ``data``, ``expert`` and ``tensor``; empty for one device.
    """

    model: Mapping[str, Any]
    data: str
    heldout: str | None = None
    heldout_share: float = 0.02
    heldout_tokens: int = 200_000
    tokenizer: str | None = None
    steps: int = 1000
    batch: int = 32
    length: int = 256
    accumulate: int = 1
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    clip: float = 1.0
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    balance_loss_coef: float | None = None
    router_z_loss_coef: float | None = None
    reduce_layers: Literal["mean", "sum"] = "mean"
    log_every: int = 20
    save_every: int = 200
    seed: int = 0
    logger: str | None = None
    mesh: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Self:
        """Read settings from a JSON file.

        Args:
            changes: settings that replace the file's; ``None`` leaves the file's value.

        Raises:
            ConfigError: the file is missing or is not JSON, or a setting is unknown, missing or senseless.
        """
        try:
            settings = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file.") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON: {error}") from error
        known = {f.name for f in fields(cls)}
        settings |= {name: value for name, value in changes.items() if value is not None}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(f"{path}: unknown fields {', '.join(unknown)}; known are: {', '.join(sorted(known))}.")
        if missing := sorted({"model", "data"} - set(settings)):
            raise ConfigError(f"{path}: no {' and no '.join(missing)}.")
        return cls(**settings).checked()

    def checked(self) -> Self:
        """Return these settings after checking them.

        Raises:
            ConfigError: a count is not a positive integer, ``heldout_tokens`` is not more than ``length``, or a mesh
                axis is unknown.
        """
        for name in ("steps", "batch", "length", "accumulate", "log_every", "save_every"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer.")
        if self.heldout_tokens <= self.length:
            raise ConfigError(f"heldout_tokens={self.heldout_tokens} are too few for length={self.length}.")
        if unknown := sorted(set(self.mesh) - {"data", "expert", "tensor"}):
            raise ConfigError(f"mesh axes {', '.join(unknown)} are unknown; there are data, expert and tensor.")
        return self

    def with_moe(self, name: str) -> Self:
        """Return these settings with the registered MoE layer ``name`` instead of the present one.

        Widths and activation stay; other settings of the layer (``moe_args``) go back to the defaults of its class.
        """
        kept = {key: value for key, value in self.model.items() if key not in ("moe", "moe_args")}
        return replace(self, model=kept | {"moe": name})

    def hugging_face(self, vocab_size: int) -> dict[str, Any]:
        """Return the decoder's config with Hugging Face's field names, as it is written beside the weights."""
        usual = {"model_type": "moejax", "vocab_size": vocab_size, "max_position_embeddings": 4 * self.length}
        model = usual | dict(self.model)
        if (name := model.get("moe")) is None or not (coefficients := self._coefficients()):
            return model
        settings = LAYERS.find(name).Args
        for coefficient in coefficients.keys() & {*settings.UNUSED}:
            raise ConfigError(f"{coefficient} does nothing in the layer {name!r}; leave it out.")
        return model | {"moe_args": coefficients | dict(model.get("moe_args") or {})}

    def _coefficients(self) -> dict[str, float]:
        """The weights of auxiliary losses that are set."""
        names = ("balance_loss_coef", "router_z_loss_coef")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def architecture(self, vocab_size: int) -> Config:
        """Return the decoder's config as moejax reads it.

        Raises:
            ConfigError: the model is not supported, or its vocabulary is smaller than ``vocab_size``.
        """
        hugging_face = self.hugging_face(vocab_size)
        config = family(hugging_face["model_type"]).config(hugging_face)
        if config.vocab_size < vocab_size:
            raise ConfigError(f"vocab_size={config.vocab_size} is less than the tokenizer's {vocab_size}.")
        return config

    def loss_weights(self) -> LossWeights:
        """Return the weights with which auxiliary losses enter the total loss."""
        balance, z = self.balance_loss_coef, self.router_z_loss_coef
        usual = LossWeights()
        return LossWeights(
            usual.balance if balance is None else balance, usual.z if z is None else z, self.reduce_layers
        )

    def optimiser(self) -> optax.GradientTransformation:
        """Return AdamW with gradient clipping, linear warm-up and cosine decay of the learning rate.

        Weights of norms, biases, other vectors and the embedding are not decayed.
        """
        peak = self.learning_rate
        # a short run warms up for a tenth of its steps
        warmup = min(self.warmup, max(1, self.steps // 10))
        schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, max(self.steps, warmup + 1), peak / 20)

        adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=_decayed)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)

    def device_mesh(self) -> Mesh | None:
        """Return the mesh of devices, or ``None`` for one device.

        Raises:
            ConfigError: there are fewer devices than the mesh needs.
        """
        if not self.mesh:
            return None
        sizes, have = tuple(self.mesh.values()), jax.device_count()
        if (need := int(jnp.prod(jnp.array(sizes)))) > have:
            raise ConfigError(f"mesh {dict(self.mesh)} needs {need} devices, there are {have}.")
        auto = (jax.sharding.AxisType.Auto,) * len(sizes)
        return jax.make_mesh(sizes, tuple(self.mesh), axis_types=auto, devices=jax.devices()[:need])

    def decoder(self, config: Config, key: PRNGKeyArray, mesh: Mesh | None) -> Decoder:
        """Return a decoder with random weights, sharded over the mesh."""
        decoder = Decoder.init(config, key)
        return decoder if mesh is None else shard(decoder, mesh)


def _decayed(decoder: Any) -> Any:
    """Return a tree of booleans: whether weight decay applies to a leaf.

    Biases are told by name: biases of heads and of experts have several axes. The first axis of an expert's leaf, which
    counts experts, makes no matrix of it.
    """

    def is_decayed(path: tuple, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        axes = leaf.ndim - (decoder.config.role(name) == "expert")
        return axes > 1 and name != "embedding" and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(is_decayed, decoder)
