"""A training run: steps, metrics, held-out losses and checkpoints, from a file of settings to a model that loads."""

import json
import time
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moejax.checkpoints import save_folder
from moejax.checkpoints.folder import BUNDLED
from moejax.checkpoints.tokenizer import Tokenizer
from moejax.errors import ConfigError, MoejaxError
from moejax.models import Decoder
from moejax.program import Program
from moejax.training.config import TrainConfig
from moejax.training.data import Corpus, find_text
from moejax.training.logs import Log
from moejax.training.losses import cross_entropy
from moejax.training.state_store import Checkpoints
from moejax.training.step import TrainState, TrainSteps, make_train_steps

Row = dict[str, Any]
"""Metrics of some steps: numbers, and for each of the layers that are mixtures a number."""

_MAY_CHANGE = ("steps", "log_every", "save_every", "mesh")
"""Settings that may be others when a run goes on; the rest makes it another run."""

_DEFAULT_TOKENIZER = BUNDLED / "tiny-olmoe"


class Run:
    """A run in ``folder``, where it goes on if it was stopped.

    ``checkpoints/`` holds the newest states, ``metrics.jsonl`` and ``tensorboard/`` the metrics, ``model/`` the trained
    model, which :func:`moejax.load` loads.

    ``decoder`` is the trained decoder once the run was iterated to its end, ``started_from`` the step it went on from.

    Raises:
        ConfigError: settings that do not fit each other, the data or the devices.
        MoejaxError: the data cannot be read.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.folder, self.started_from = config, folder, 0
        config.architecture(self.vocab_size)  # before there is a folder
        text = json.dumps({**vars(config), "model": dict(config.model), "mesh": dict(config.mesh)}, indent=2)
        about = folder / "config.json"
        kept = json.loads(text)
        before = json.loads(about.read_text()) if about.exists() else kept
        if other := [name for name in kept if name not in _MAY_CHANGE and before.get(name) != kept[name]]:
            raise ConfigError(f"{folder} holds a run with another {', '.join(other)}; choose another folder for this.")
        folder.mkdir(parents=True, exist_ok=True)
        about.write_text(text + "\n")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data's tokenizer."""
        named = self.config.tokenizer
        beside = Path(self.config.data).parent
        folder = Path(named).parent if named else beside if self.config.data.endswith(".npz") else _DEFAULT_TOKENIZER
        found = Tokenizer.from_folder(folder)
        if found is None:
            raise ConfigError(f"{folder}: no tokenizer.json; name one as the field 'tokenizer'.")
        return found

    @cached_property
    def vocab_size(self) -> int:
        """Entries of the tokenizer's vocabulary."""
        return self.tokenizer.backend.get_vocab_size()

    @cached_property
    def _corpora(self) -> tuple[Corpus, Corpus]:
        train = self._read(self.config.data)
        c = self.config
        if c.heldout is not None:
            return train, self._read(c.heldout)
        rest, heldout = train.split(c.heldout_share)
        if min(len(rest.tokens), len(heldout.tokens)) <= c.length:
            raise ConfigError(
                f"heldout_share={c.heldout_share} of {len(train.tokens)} tokens leaves too few on one side for "
                f"length={c.length}."
            )
        return rest, heldout

    def _read(self, path: str) -> Corpus:
        if path.endswith(".npz"):
            corpus = Corpus.read(Path(path))
        else:
            corpus = Corpus.of_texts(find_text(path), self.tokenizer, end=0)
        if len(corpus.tokens) <= self.config.length:
            raise MoejaxError(f"{path}: {len(corpus.tokens)} tokens are not enough for length={self.config.length}.")
        if corpus.tokens.max() >= self.vocab_size:
            raise MoejaxError(f"{path}: token {corpus.tokens.max()} is not in the tokenizer of {self.vocab_size}.")
        return corpus

    def __iter__(self) -> Iterator[Row]:
        """Train; one row of metrics every ``log_every`` steps, means over these.

        Raises:
            MoejaxError: the loss or a router's logits are no longer finite; the message names the layer.
        """
        c, mesh = self.config, self.config.device_mesh()
        train, heldout = self._corpora
        tokens = jnp.asarray(train.tokens)
        optimiser = c.optimiser()
        decoder = c.decoder(c.architecture(self.vocab_size), jax.random.key(c.seed), mesh)
        state = TrainState.start(decoder, optimiser)
        checkpoints = Checkpoints(self.folder / "checkpoints")
        if (restored := checkpoints.restore(state)) is not None:
            state = restored
        self.started_from = int(state.step)

        @cache
        def steps(count: int) -> TrainSteps:
            return make_train_steps(
                optimiser,
                batch=c.batch,
                length=c.length,
                count=count,
                seed=c.seed,
                weights=c.loss_weights(),
                compute_dtype=jnp.dtype(c.compute_dtype),
                accumulate=c.accumulate,
                mesh=mesh,
            )

        with Log(self.folder, from_step=int(state.step)) as log:
            while int(state.step) < c.steps:
                # up to a multiple, also where a run with another `log_every` was stopped
                count = min(c.log_every - int(state.step) % c.log_every, c.steps - int(state.step))
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(steps(count)(state, tokens))
                seconds = (time.perf_counter() - start) / count
                row = summarise(jax.device_get(metrics), int(state.step)) | {"seconds_per_step": seconds}
                if int(state.step) % c.save_every == 0 or int(state.step) == c.steps:
                    row["heldout"] = held_out(state.decoder, heldout.tokens[: c.heldout_tokens], c.length)
                    checkpoints.save(state)
                log.write(row)
                yield row
        self.decoder = state.decoder
        self._publish(state.decoder)

    def _publish(self, decoder: Decoder) -> None:
        hugging_face = self.config.hugging_face(self.vocab_size)
        save_folder(decoder, hugging_face, self.folder / "model")
        self.tokenizer.backend.save(str(self.folder / "model" / "tokenizer.json"))


def summarise(metrics: dict[str, np.ndarray], step: int) -> Row:
    """Means over the steps; loads as entropy over its largest value, largest share and share of unused experts.

    Raises:
        MoejaxError: something is not finite.
    """
    first = step - len(metrics["cross_entropy"])
    if "nonfinite" in metrics and (bad := np.argwhere(metrics["nonfinite"])).size:
        at, layer = bad[0]
        raise MoejaxError(f"step {first + at + 1}: router logits of mixture {layer} (counted from 0) are not finite.")
    if (bad := np.flatnonzero(~np.isfinite(metrics["cross_entropy"]))).size:
        raise MoejaxError(f"step {first + bad[0] + 1}: the loss is not finite; try a lower learning_rate.")
    row: Row = {"step": step}
    for name, values in metrics.items():
        if name not in ("load", "nonfinite"):
            mean = values.mean(0)
            row[name] = float(mean) if mean.ndim == 0 else mean.tolist()
    if (load := metrics.get("load")) is not None:
        share = load.mean(0)
        nats = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
        row["load_entropy"] = (nats / np.log(max(share.shape[-1], 2))).tolist()
        row["largest_load"] = (share.max(-1) * share.shape[-1]).tolist()
        row["unused_experts"] = (share == 0).mean(-1).tolist()
    return row


@Program
def _nats(decoder: Decoder, rows: Int[Array, "N B T1"]) -> Array:
    def one(batch: Array) -> Array:
        return cross_entropy(decoder, decoder.hidden(batch[:, :-1]).stream, batch[:, 1:])

    return jax.lax.map(one, rows).mean()


def held_out(decoder: Decoder, tokens: np.ndarray, length: int, batch: int = 16) -> float:
    """Mean nats per token over windows of ``length`` side by side, in float32; what does not fill one is left out.

    Raises:
        MoejaxError: there is none.
    """
    windows = (len(tokens) - 1) // length
    if not windows:
        raise MoejaxError(f"{len(tokens)} held-out tokens have no window of length={length} and a token after it.")
    starts = np.arange(windows)[:, None] * length
    rows = np.asarray(tokens)[starts + np.arange(length + 1)].astype(np.int32)
    whole = windows - windows % batch
    parts = [rows[:whole].reshape(-1, batch, length + 1), rows[whole:][None]]
    nats = [float(_nats(decoder, jnp.asarray(part))) * part[..., 0].size for part in parts if part.size]
    return sum(nats) / windows
