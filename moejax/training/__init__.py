"""Training: packed text, losses over a model, the train step, checkpoints to resume from, and whole runs."""

from moejax.training.checkpoint import Checkpoints
from moejax.training.config import TrainConfig
from moejax.training.data import Corpus, windows
from moejax.training.losses import LossWeights, language_model_loss
from moejax.training.run import Run
from moejax.training.step import TrainState, make_train_steps

__all__ = [
    "Checkpoints",
    "Corpus",
    "LossWeights",
    "Run",
    "TrainConfig",
    "TrainState",
    "language_model_loss",
    "make_train_steps",
    "windows",
]
