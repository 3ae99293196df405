"""A training run: steps, metrics, held-out losses and saved states, from a file of settings to a model that loads."""

import contextlib
import json
import os
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
from moejax.checkpoints.files import read_object
from moejax.checkpoints.folder import BUNDLED
from moejax.checkpoints.tokenizer import Tokenizer
from moejax.errors import ConfigError, MoejaxError
from moejax.models import Decoder
from moejax.processes import need_one_process
from moejax.program import Program
from moejax.training.config import TrainConfig
from moejax.training.data import Corpus
from moejax.training.loggers import check_logger
from moejax.training.logs import METRICS, MetricsLog
from moejax.training.losses import cross_entropy
from moejax.training.state_store import StateStore, newest_step
from moejax.training.step import TrainState, TrainSteps, make_train_steps
from moejax.training.texts import find_text
from moejax.writing import LOCK, locked, remove_temporaries, write_file

Row = dict[str, Any]
"""Metrics of one or more steps: a number, or a list with one number for each mixture layer."""

_MAY_CHANGE = ("steps", "log_every", "save_every", "logger", "mesh")
"""Settings that may change when a run is resumed; a change of any other setting would make it another run."""

_OLD_DEFAULTS = {"balance_loss_coef": 0.01, "router_z_loss_coef": 0.001}

_STATES = "checkpoints"

_NAMES = (_STATES, METRICS, "tensorboard", "model")
"""What a run writes beside its settings."""

_DEFAULT_TOKENIZER = BUNDLED / "tiny-olmoe"


class Run:
    """A training run in ``folder``. Iterate over it to train; a run that was stopped is resumed.

    The folder holds ``config.json`` (the settings), ``checkpoints/`` (the newest states), ``metrics.jsonl`` and
    ``tensorboard/`` (the metrics) and, at the end, ``model/`` (the trained model, which :func:`moejax.load` loads).

    Args:
        falls_back: whether damaged states are set aside, with a warning that names their steps, and the run goes on
            from the newest that is whole; otherwise a damaged newest state is an error.

    Attributes:
        config: the settings.
        folder: the folder.
        started_from: the step from which the run was resumed, 0 for a new run; set when the iteration begins.
        saved_step: the step of the newest saved state, 0 if there is none.
        stopped: whether the run ended because :meth:`stop` was called.
        decoder: the trained decoder; set at the end of the iteration.

    Raises:
        ConfigError: the settings do not fit each other, the data, the devices, or the run that the folder holds; or the
            folder holds something else.
        MoejaxError: the data cannot be read.
    """

    def __init__(self, config: TrainConfig, folder: Path, *, falls_back: bool = True) -> None:
        need_one_process("training")
        self.config, self.folder, self.started_from, self._falls_back = config, folder, 0, falls_back
        self.stopped, self._shall_stop = False, False
        config.architecture(self.vocab_size)
        self._check_folder()

    def _check_folder(self) -> None:
        """Find the newest state, and check that the folder's run, if it has one, has these settings."""
        folder, new = self.folder, json.loads(self._settings())
        self.saved_step = newest_step(folder / _STATES)
        old = read_object(folder, "config.json", ConfigError) if folder.is_dir() else None
        if old is None and (there := [name for name in _NAMES if os.path.lexists(folder / name)]):
            raise ConfigError(f"{folder} holds {there[0]}, but no config.json of a run; choose another folder.")
        if old is not None and not old.keys() <= new.keys():
            raise ConfigError(f"{folder / 'config.json'}: not the settings of a run; choose another folder.")
        if old is None or not self.saved_step:
            # a run that was never saved is none: whoever mends its settings shall not need another folder
            old = new
        # versions before 0.2 wrote these numbers where nothing was set
        old |= {name: None for name, usual in _OLD_DEFAULTS.items() if new[name] is None and old.get(name) == usual}
        if changed := [name for name in new if name not in _MAY_CHANGE and old.get(name) != new[name]]:
            raise ConfigError(
                f"{folder} holds a run with another {', '.join(changed)}; choose another folder for this run."
            )

    def _settings(self) -> str:
        """The settings as the folder has them."""
        c = self.config
        return json.dumps({**vars(c), "model": dict(c.model), "mesh": dict(c.mesh)}, indent=2)

    @property
    def is_done(self) -> bool:
        """Whether the folder has the trained model of these settings."""
        model, states = self.folder / "model" / "tokenizer.json", self.folder / _STATES / str(self.saved_step)
        if self.saved_step < self.config.steps or not model.exists():
            return False
        # else the model is that of fewer steps, and the run was killed before it wrote the new one
        return model.stat().st_mtime >= states.stat().st_mtime

    def stop(self) -> None:
        """Have the iteration end, with a saved state, after the steps that run now.

        A signal's handler may call it, as that of ``moejax train`` does (:mod:`moejax.cli.training`).
        """
        self._shall_stop = True

    def check(self) -> None:
        """Check all that can be checked before the model is made.

        Raises:
            ConfigError, MoejaxError: as the class says.
        """
        check_logger(self.config.logger)
        self.config.device_mesh()
        _ = self.corpora
        self._train_steps(1)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the data.

        Raises:
            ConfigError: the folder has no ``tokenizer.json``.
        """
        named = self.config.tokenizer
        beside = Path(self.config.data).parent
        folder = Path(named).parent if named else beside if self.config.data.endswith(".npz") else _DEFAULT_TOKENIZER
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise ConfigError(f"{folder}: no tokenizer.json; name one as the field 'tokenizer'.")
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Number of entries of the tokenizer's vocabulary."""
        return self.tokenizer.vocab_size

    @cached_property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """The corpus to train on and the held-out corpus.

        Raises:
            ConfigError: one side of the split has no more tokens than a window.
            MoejaxError: a file cannot be read, is too short, or has tokens that the tokenizer lacks.
        """
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
        """Read a corpus or texts, and check that they fit the tokenizer and ``length``."""
        if path.endswith(".npz"):
            corpus = Corpus.read(Path(path))
        else:
            corpus = Corpus.from_texts(find_text(path), self.tokenizer, end=0)
        if len(corpus.tokens) <= self.config.length:
            raise MoejaxError(f"{path}: {len(corpus.tokens)} tokens are not enough for length={self.config.length}.")
        if corpus.tokens.max() >= self.vocab_size:
            raise MoejaxError(f"{path}: token {corpus.tokens.max()} is not in the tokenizer of {self.vocab_size}.")
        return corpus

    def __iter__(self) -> Iterator[Row]:
        """Train, and yield a row of metrics every ``log_every`` steps: means over these steps.

        Rows after which a state is saved, the last one among them, also have ``heldout``, the held-out loss in nats
        per token. After :meth:`stop` a state is saved without it.

        Raises:
            MoejaxError: the loss or a router's logits are no longer finite; the message names the step and the layer.
            CheckpointError: no saved state can be read, or a state or the model cannot be written.
            BusyError: another run is training in the folder.
            OSError: a file cannot be written.
        """
        self.check()
        # nothing is written before here, so that a mistake leaves no folder behind
        self.folder.mkdir(parents=True, exist_ok=True)
        is_first = jax.process_index() == 0
        with locked(self.folder / LOCK, self.folder) if is_first else contextlib.nullcontext():
            self._check_folder()  # again: another run may have been here
            remove_temporaries(self.folder)
            write_file(self.folder / "config.json", self._settings() + "\n")
            yield from self._train()

    def _train(self) -> Iterator[Row]:
        """Train in a folder whose lock is held."""
        c, mesh = self.config, self.config.device_mesh()
        train, heldout = self.corpora
        tokens = jnp.asarray(train.tokens)
        decoder = c.decoder(c.architecture(self.vocab_size), jax.random.key(c.seed), mesh)
        state = TrainState.start(decoder, c.optimiser())
        store = StateStore(self.folder / _STATES)
        if (restored := store.restore(state, falls_back=self._falls_back)) is not None:
            state = restored
        self.started_from = self.saved_step = step = int(state.step)
        train_steps = cache(self._train_steps)

        with MetricsLog(self.folder, step, c.logger, json.loads(self._settings())) as log:
            while step < c.steps and not self._shall_stop:
                # up to the next multiple of `log_every`; a run that was stopped may have had another `log_every`
                count = min(c.log_every - step % c.log_every, c.steps - step)
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(train_steps(count)(state, tokens))
                seconds = (time.perf_counter() - start) / count
                step = int(state.step)
                row = summarise(jax.device_get(metrics), step) | {"seconds_per_step": seconds}
                is_saved = step // c.save_every > (step - count) // c.save_every or step == c.steps
                if is_saved:
                    row["heldout"] = held_out(state.decoder, heldout.tokens[: c.heldout_tokens], c.length)
                # the row first: a run that is killed in between does the step again, and no row is lost
                log.write(row)
                if is_saved:
                    store.save(state)
                    self.saved_step = step
                yield row
            if step > self.saved_step:
                store.save(state)
                self.saved_step = step
        self.decoder, self.stopped = state.decoder, step < c.steps
        if not self.stopped:
            self._publish(state.decoder)

    def _train_steps(self, count: int) -> TrainSteps:
        """A compiled function that runs ``count`` steps."""
        c = self.config
        return make_train_steps(
            c.optimiser(),
            batch=c.batch,
            length=c.length,
            count=count,
            seed=c.seed,
            weights=c.loss_weights(),
            compute_dtype=jnp.dtype(c.compute_dtype),
            accumulate=c.accumulate,
            mesh=c.device_mesh(),
        )

    def _publish(self, decoder: Decoder) -> None:
        """Write the trained model and its tokenizer into ``model/``, in the format of Hugging Face."""
        hugging_face = self.config.hugging_face(self.vocab_size)
        save_folder(decoder, hugging_face, self.folder / "model")
        self.tokenizer.save(self.folder / "model")


def summarise(metrics: dict[str, np.ndarray], step: int) -> Row:
    """Return the means of metrics over steps.

    ``load``, each expert's share of the slots, is replaced by three numbers for each mixture layer:

    - ``load_entropy``: entropy of the mean load, divided by its largest value log E; 1 for balanced experts.
    - ``largest_load``: largest mean load, times E; 1 for balanced experts.
    - ``unused_experts``: fraction of the experts without any slot.

    Args:
        metrics: what a program of train steps returns, ``[M ...]`` for ``M`` steps.
        step: number of steps done, these included.

    Raises:
        MoejaxError: the loss or a router's logits are not finite.
    """
    first = step - len(metrics["cross_entropy"])
    if "nonfinite" in metrics and (bad := np.argwhere(metrics["nonfinite"])).size:
        index, layer = bad[0]
        raise MoejaxError(
            f"step {first + index + 1}: router logits of mixture {layer} (counted from 0) are not finite."
        )
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
def _nats(decoder: Decoder, rows: Int[Array, "batches B T1"]) -> Array:
    """Return the mean cross-entropy of all windows in nats per token; a window has T + 1 tokens."""

    def one(batch: Array) -> Array:
        return cross_entropy(decoder, decoder.hidden(batch[:, :-1]).stream, batch[:, 1:])

    return jax.lax.map(one, rows).mean()


def held_out(decoder: Decoder, tokens: np.ndarray, length: int, batch: int = 16) -> float:
    """Return the mean cross-entropy of held-out tokens in nats per token, computed in float32.

    The tokens are cut into adjoining windows; a rest at the end that does not fill a window is left out.

    Args:
        length: tokens of a window that are predicted.
        batch: windows that are computed at a time.

    Raises:
        MoejaxError: there are fewer tokens than one window and the token after it.
    """
    num_windows = (len(tokens) - 1) // length
    if not num_windows:
        raise MoejaxError(f"{len(tokens)} held-out tokens have no window of length={length} and a token after it.")
    starts = np.arange(num_windows)[:, None] * length
    rows = np.asarray(tokens)[starts + np.arange(length + 1)].astype(np.int32)
    in_full_batches = num_windows - num_windows % batch
    parts = [rows[:in_full_batches].reshape(-1, batch, length + 1), rows[in_full_batches:][None]]
    nats = [float(_nats(decoder, jnp.asarray(part))) * part[..., 0].size for part in parts if part.size]
    return sum(nats) / num_windows
