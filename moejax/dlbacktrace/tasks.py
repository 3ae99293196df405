"""A task: what is generated, and the relevance of its steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from moejax.dlbacktrace import capture
from moejax.dlbacktrace.initial_relevance import GENERATION, start_weights
from moejax.dlbacktrace.inputs import Batch
from moejax.dlbacktrace.propagation import Run, StepRelevance, of_tokens, of_weights
from moejax.dlbacktrace.settings import Settings
from moejax.errors import PromptError
from moejax.lm import LM
from moejax.rules import Rule

Steps = Iterator[tuple[int, Any, StepRelevance]]
"""Of each explained step its index, its token (with several rows an array) and its relevance."""


@dataclass(frozen=True)
class Question:
    """What is asked of a batch; as ``Backtrace.run_task`` has it.

    Attributes:
        max_length: most tokens of prompt and answer together.
        only_last: explain the last of the steps only.
    """

    task: str
    rule: Rule
    settings: Settings
    multiplier: float | int = 100.0
    thresholding: float | int = 0.5
    temperature: float | int | None = 1.0
    max_length: int | None = None
    return_scores: bool = False
    only_last: bool = False


class Outcome(NamedTuple):
    """What a task gave.

    Attributes:
        ids: prompts, in the columns in which they were given, and answers behind them.
        prompt: columns of the prompts.
        lengths: of the answers, the token that ended one included.
        read: what the model has read at the last step.
        columns: how many columns it has read at each step.
        scores: what each step's token was chosen from, if asked for.
        relevance: of the steps to explain; computed when it is iterated over.
        stopped: why no more was generated.
    """

    ids: Int[np.ndarray, "B T"]
    prompt: int
    lengths: Int[np.ndarray, " B"]
    read: Batch
    columns: range
    scores: list[Float[np.ndarray, "B V"]]
    relevance: Steps
    stopped: str


def answer(lm: LM, prompts: Batch, question: Question) -> Outcome:
    """Carry out a task.

    Raises:
        PromptError: a prompt leaves no room for an answer.
        MoejaxError: an option out of range.
    """
    # before anything is computed
    question.settings.explained(0)
    return (_generate if question.task == GENERATION else _classify)(lm, prompts, question)


def _generate(lm: LM, prompts: Batch, question: Question) -> Outcome:
    settings = question.settings
    options = settings.for_generation(lm, question.temperature)
    if question.max_length is not None:
        longest = int(prompts.lengths.max())
        room = question.max_length - longest
        if room < 1:
            raise PromptError(f"a prompt of {longest} tokens leaves no room in max_length={question.max_length}.")
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
    made = lm.generate_tokens(prompts.rows, return_scores=question.return_scores, **options)
    lengths = np.asarray(made.lengths).astype(np.int64)
    count = int(lengths.max())
    tokens = np.asarray(made.tokens)[:, :count].astype(np.int64)
    prompts = prompts.repeated(len(tokens) // len(prompts.ids))
    # the last token is chosen, not read
    whole, width = prompts.followed_by(tokens[:, :-1], lengths - 1), prompts.ids.shape[1]
    steps = settings.explained(count)[-1 if question.only_last else 0 :]

    def relevance() -> Steps:
        run = Run(lm, question.rule, whole, width)
        for step, found in of_tokens(run, tokens, steps, question.multiplier):
            yield step, int(tokens[0, step]) if len(tokens) == 1 else tokens[:, step], found

    return Outcome(
        ids=np.concatenate([prompts.ids, tokens], axis=1),
        prompt=width,
        lengths=lengths,
        read=whole,
        columns=range(width, width + count),
        scores=[] if made.scores is None else list(np.asarray(made.scores)[:, :count].swapaxes(0, 1)),
        relevance=relevance(),
        stopped=_stopped(tokens, lengths, options, lm),
    )


def _stopped(tokens: np.ndarray, lengths: np.ndarray, options: dict[str, Any], lm: LM) -> str:
    ends = options.get("eos_ids", lm.config.eos_ids)
    if np.isin(tokens[np.arange(len(tokens)), lengths - 1], ends).all():
        return "end of text"
    return "max_new_tokens" if tokens.shape[1] == options["max_new_tokens"] else "max_time"


def _classify(lm: LM, prompts: Batch, question: Question) -> Outcome:
    """Nothing is generated: one step, the tokens that are likely next."""
    logits, width = last_logits(lm, prompts), prompts.ids.shape[1]
    best = logits.argmax(1)

    def relevance() -> Steps:
        if not question.settings.explained(1):
            return
        weights = start_weights(
            prompts,
            logits,
            task=question.task,
            multiplier=question.multiplier,
            thresholding=question.thresholding,
        )
        found, _ = of_weights(Run(lm, question.rule, prompts, width), weights)
        yield 0, int(best[0]) if len(best) == 1 else best, found

    return Outcome(
        ids=prompts.ids,
        prompt=width,
        lengths=np.zeros(len(logits), np.int64),
        read=prompts,
        columns=range(width, width + 1),
        scores=[logits],
        relevance=relevance(),
        stopped="the task",
    )


def last_logits(lm: LM, batch: Batch) -> Float[np.ndarray, "B V"]:
    """Logits behind the last token of each row."""
    tokens, valid = batch.left(lm.config.pad_id)
    return np.asarray(lm(tokens, valid=valid)[:, -1])


def last_of(batch: Batch, values: Float[np.ndarray, "B T V"]) -> Float[np.ndarray, "B V"]:
    """Values at the last token of each row."""
    last = batch.ids.shape[1] - 1 - np.argmax(batch.valid[:, ::-1], axis=1)
    return values[np.arange(len(values)), last]


def layer_outputs(lm: LM, batch: Batch) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What enters and what leaves every node, in the columns of the batch; zero at padding.

    What enters holds the mask too, as ``"attention_mask"``.
    """
    tokens, valid = batch.left(lm.config.pad_id)
    found = jax.device_get(capture.values(lm.flat, tokens, valid))
    columns = {name: batch.in_columns(x, batch.ids.shape[1]) for name, x in found.items()}
    entering, leaving = capture.by_node(columns, batch.ids, lm.config.num_layers)
    return entering | {"attention_mask": batch.valid.astype(np.int64)}, leaving


def up_to(outputs: dict[str, np.ndarray], columns: int) -> dict[str, np.ndarray]:
    """The first columns of every node's values."""
    return {name: x[:, :columns] for name, x in outputs.items()}
