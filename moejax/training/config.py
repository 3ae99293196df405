"""What a training run is told: one JSON file."""

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
from moejax.models import Config, Decoder, family, shard
from moejax.training.losses import LossWeights


@dataclass(frozen=True)
class TrainConfig:
    """A run. Paths are relative to the folder in which it is started.

    Attributes:
        model: the decoder, with the field names of Hugging Face configs; ``model_type`` is ``moejax`` by default, whose
            fields ``moejax/models/families/moejax.py`` lists. The vocabulary is the tokenizer's by default.
        data: a corpus (``.npz``), or texts (``.jsonl``, or plain), read as by ``read_texts``; ``"sample"`` is bundled.
        heldout: the same for the held-out loss; by default the last ``heldout_share`` of the data, at most
            ``heldout_tokens`` of either.
        tokenizer: a ``tokenizer.json``; by default that beside a corpus, else that of the bundled model.
        batch, length: sequences of a step, and their tokens.
        accumulate: micro-batches of a step.
        learning_rate: at its highest, after ``warmup`` steps; it falls to a twentieth of it along a cosine.
        weight_decay: of matrices, the embedding excepted.
        clip: largest norm of a gradient.
        compute_dtype: of the forward and backward pass; parameters are float32.
        balance_loss_coef, router_z_loss_coef, reduce_layers: as in :class:`moejax.training.LossWeights`.
        log_every, save_every: steps between lines of metrics, and between checkpoints with a held-out loss.
        mesh: sizes of the axes ``data``, ``expert`` and ``tensor`` over which devices are laid out; one by default.
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
    balance_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    reduce_layers: Literal["mean", "sum"] = "mean"
    log_every: int = 20
    save_every: int = 200
    seed: int = 0
    mesh: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Self:
        """Read a JSON file; ``changes`` that are not ``None`` replace its fields.

        Raises:
            ConfigError: no such file, no JSON object, or fields that are unknown, missing or make no sense.
        """
        try:
            found = json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path}: no such file.") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON: {error}") from error
        known = {f.name for f in fields(cls)}
        found |= {name: value for name, value in changes.items() if value is not None}
        if unknown := sorted(set(found) - known):
            raise ConfigError(f"{path}: unknown fields {', '.join(unknown)}; known are: {', '.join(sorted(known))}.")
        if missing := sorted({"model", "data"} - set(found)):
            raise ConfigError(f"{path}: no {' and no '.join(missing)}.")
        return cls(**found).checked()

    def checked(self) -> Self:
        """These settings, if they make sense.

        Raises:
            ConfigError: a number that is not positive, intervals that do not divide, fewer held-out tokens than a
                window has, or an unknown mesh axis.
        """
        for name in ("steps", "batch", "length", "accumulate", "log_every", "save_every"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer.")
        for name, unit in (("save_every", "log_every"), ("steps", "log_every")):
            if getattr(self, name) % getattr(self, unit):
                raise ConfigError(f"{name}={getattr(self, name)} must be a multiple of {unit}={getattr(self, unit)}.")
        if self.heldout_tokens <= self.length:
            raise ConfigError(f"heldout_tokens={self.heldout_tokens} are too few for length={self.length}.")
        if unknown := sorted(set(self.mesh) - {"data", "expert", "tensor"}):
            raise ConfigError(f"mesh axes {', '.join(unknown)} are unknown; there are data, expert and tensor.")
        return self

    def with_moe(self, name: str) -> Self:
        """The same with another MoE layer; its settings are those of the class, but for widths and activation."""
        kept = {key: value for key, value in self.model.items() if key not in ("moe", "moe_args")}
        return replace(self, model=kept | {"moe": name})

    def hugging_face(self, vocab_size: int) -> dict[str, Any]:
        """The decoder's config as it is written beside the weights."""
        return {"model_type": "moejax", "vocab_size": vocab_size, "max_position_embeddings": 4 * self.length} | dict(
            self.model
        )

    def architecture(self, vocab_size: int) -> Config:
        """The decoder's architecture.

        Raises:
            ConfigError: it is not supported.
        """
        hugging_face = self.hugging_face(vocab_size)
        config = family(hugging_face["model_type"]).config(hugging_face)
        if config.vocab_size < vocab_size:
            raise ConfigError(f"vocab_size={config.vocab_size} is less than the tokenizer's {vocab_size}.")
        return config

    def loss_weights(self) -> LossWeights:
        """How auxiliary losses enter the total."""
        return LossWeights(self.balance_loss_coef, self.router_z_loss_coef, self.reduce_layers)

    def optimiser(self) -> optax.GradientTransformation:
        """AdamW with warm-up and cosine decay; norms, biases, other vectors and the embedding are not decayed."""
        peak = self.learning_rate
        # shorter runs warm up for a tenth of them
        warmup = min(self.warmup, max(1, self.steps // 10))
        schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, max(self.steps, warmup + 1), peak / 20)

        adam = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=_decayed)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)

    def device_mesh(self) -> Mesh | None:
        """The mesh, if there is to be one.

        Raises:
            ConfigError: fewer devices than it needs.
        """
        if not self.mesh:
            return None
        sizes, have = tuple(self.mesh.values()), jax.device_count()
        if (need := int(jnp.prod(jnp.array(sizes)))) > have:
            raise ConfigError(f"mesh {dict(self.mesh)} needs {need} devices, there are {have}.")
        auto = (jax.sharding.AxisType.Auto,) * len(sizes)
        return jax.make_mesh(sizes, tuple(self.mesh), axis_types=auto, devices=jax.devices()[:need])

    def decoder(self, config: Config, key: PRNGKeyArray, mesh: Mesh | None) -> Decoder:
        """The decoder with random weights, laid over the mesh."""
        decoder = Decoder.init(config, key)
        return decoder if mesh is None else shard(decoder, mesh)


def _decayed(decoder: Any) -> Any:
    """Which leaves are decayed; a bias is none whatever its axes are."""

    def one(path: tuple, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return leaf.ndim > 1 and name != "embedding" and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(one, decoder)
