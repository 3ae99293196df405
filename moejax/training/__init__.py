"""Training: token corpora, losses over a model, the train step, saved states to resume from, and whole runs."""

import warnings
from typing import Any

from moejax.training.config import TrainConfig
from moejax.training.data import Corpus, windows
from moejax.training.losses import LossWeights, language_model_loss
from moejax.training.run import Run
from moejax.training.state_store import StateStore
from moejax.training.step import TrainState, make_train_steps
from moejax.training.upcycle import MixtureSpec, Upcycled, expert_stack, upcycle

__all__ = [
    "Corpus",
    "LossWeights",
    "MixtureSpec",
    "Run",
    "StateStore",
    "TrainConfig",
    "TrainState",
    "Upcycled",
    "expert_stack",
    "language_model_loss",
    "make_train_steps",
    "upcycle",
    "windows",
]


def __getattr__(name: str) -> Any:
    """Return :class:`StateStore` under its earlier name ``Checkpoints``, with a warning."""
    if name == "Checkpoints":
        message = "moejax.training.Checkpoints is now called moejax.training.StateStore."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return StateStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
