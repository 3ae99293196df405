"""Training: packed text, losses over a model, the train step, checkpoints to resume from, and whole runs."""

from moejax.training.config import TrainConfig
from moejax.training.data import Corpus, windows
from moejax.training.losses import LossWeights, language_model_loss
from moejax.training.run import Run
from moejax.training.state_store import Checkpoints
from moejax.training.step import TrainState, make_train_steps
from moejax.training.upcycle import MixtureSpec, Upcycled, expert_stack, upcycle

__all__ = [
    "Checkpoints",
    "Corpus",
    "LossWeights",
    "MixtureSpec",
    "Run",
    "TrainConfig",
    "TrainState",
    "Upcycled",
    "expert_stack",
    "language_model_loss",
    "make_train_steps",
    "upcycle",
    "windows",
]
