"""Training: packed text, losses over a model, the train step, and checkpoints to resume from."""

from moejax.training.checkpoint import Checkpoints
from moejax.training.data import Corpus, windows
from moejax.training.losses import LossWeights, language_model_loss
from moejax.training.step import TrainState, make_train_steps
from moejax.training.upcycle import MixtureSpec, Upcycled, expert_stack, upcycle

__all__ = [
    "Checkpoints",
    "Corpus",
    "LossWeights",
    "MixtureSpec",
    "TrainState",
    "Upcycled",
    "expert_stack",
    "language_model_loss",
    "make_train_steps",
    "upcycle",
    "windows",
]
