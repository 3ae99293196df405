"""A task: what is generated, and the relevance of its steps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from moejax.dlbacktrace import capture
from moejax.dlbacktrace.initial_relevance import GENERATION, InitialRelevance
from moejax.dlbacktrace.inputs import EncodedInputs
from moejax.dlbacktrace.propagation import PropagationRun, StepRelevance, relevance_of_logits, relevance_of_tokens
from moejax.dlbacktrace.relevance_trace import CachePolicy
from moejax.dlbacktrace.settings import BacktraceSettings
from moejax.errors import PromptError
from moejax.lm import LM
from moejax.rules import Rule

Steps = Iterator[tuple[int, Any, StepRelevance]]
"""Each explained step: its index, its token (an array if there are several rows) and its relevance."""


class Returned(NamedTuple):
    """The parts of the result that are asked for beside the generated ids."""

    scores: bool = False
    relevance: bool = False
    layerwise_output: bool = False


@dataclass(frozen=True)
class TaskRequest:
    """Everything that ``Backtrace.run_task`` is asked, beside the inputs.

    Attributes:
        initial: the task, and the relevance that it starts from.
        rule: the rule that propagates relevance.
        settings: options of the generation, and the steps to explain.
        temperature: temperature of the draw; 1 alone takes the best token.
        max_length: most tokens of prompt and answer together.
        returned: the parts of the result.
        cache: what the trace keeps of each step. ``"none"`` explains the last step only.
        scaler: the sum to which every node's relevance is rescaled; 0 does not rescale.
    """

    initial: InitialRelevance
    rule: Rule
    settings: BacktraceSettings
    temperature: float | int | None = 1.0
    max_length: int | None = None
    returned: Returned = Returned()
    cache: CachePolicy = field(default_factory=CachePolicy)
    scaler: float | int = 0.0


class TaskOutcome(NamedTuple):
    """The outcome of a task.

    Attributes:
        ids: token ids of the prompts, in the columns in which they were given, and of the answers behind them.
        prompt: number of columns of the prompts.
        lengths: number of tokens of each answer, with the token that ended it.
        read: what the model has read at the last step.
        columns: number of columns that the model has read at each step.
        scores: what each step's token was chosen from, if asked for.
        relevance: relevance of the steps to explain; computed while it is iterated over.
        stopped: why the generation ended.
    """

    ids: Int[np.ndarray, "B T"]
    prompt: int
    lengths: Int[np.ndarray, " B"]
    read: EncodedInputs
    columns: range
    scores: list[Float[np.ndarray, "B V"]]
    relevance: Steps
    stopped: str

    @property
    def answers(self) -> list[list[int]]:
        """Token ids of each answer, with the token that ended it."""
        rows = zip(self.ids[:, self.prompt :].tolist(), self.lengths, strict=True)
        return [row[:length] for row, length in rows]


def carry_out(lm: LM, prompts: EncodedInputs, request: TaskRequest) -> TaskOutcome:
    """Carry out a task.

    Raises:
        PromptError: a prompt leaves no room for an answer.
        MoejaxError: an option out of range.
    """
    # refuses wrong values of explain_tokens before anything is computed
    request.settings.explained(0)
    return (_generate if request.initial.task == GENERATION else _classify)(lm, prompts, request)


def _generate(lm: LM, prompts: EncodedInputs, request: TaskRequest) -> TaskOutcome:
    settings = request.settings
    longest = int(prompts.lengths.max())
    options = settings.for_generation(lm, request.temperature, longest)
    if request.max_length is not None:
        room = request.max_length - longest
        if room < 1:
            raise PromptError(f"a prompt of {longest} tokens leaves no room in max_length={request.max_length}.")
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
    generation = lm.generate_tokens(prompts.rows, return_scores=request.returned.scores, **options)
    lengths = np.asarray(generation.lengths).astype(np.int64)
    count = int(lengths.max())
    tokens = np.asarray(generation.tokens)[:, :count].astype(np.int64)
    prompts = prompts.repeated(len(tokens) // len(prompts.ids))
    # the last token is chosen, not read
    read, width = prompts.followed_by(tokens[:, :-1], lengths - 1), prompts.ids.shape[1]
    steps = settings.explained(count)[-1 if request.cache.name == "none" else 0 :]

    def relevance() -> Steps:
        run = PropagationRun(lm, request.rule, read, width)
        for step, result in relevance_of_tokens(run, tokens, steps, request.initial.multiplier):
            yield step, int(tokens[0, step]) if len(tokens) == 1 else tokens[:, step], result

    return TaskOutcome(
        ids=np.concatenate([prompts.ids, tokens], axis=1),
        prompt=width,
        lengths=lengths,
        read=read,
        columns=range(width, width + count),
        scores=[] if generation.scores is None else list(np.asarray(generation.scores)[:, :count].swapaxes(0, 1)),
        relevance=relevance(),
        stopped=_stop_reason(tokens, lengths, options, lm),
    )


def _stop_reason(tokens: np.ndarray, lengths: np.ndarray, options: dict[str, Any], lm: LM) -> str:
    ends = options.get("eos_ids", lm.eos_ids)
    if np.isin(tokens[np.arange(len(tokens)), lengths - 1], ends).all():
        return "end of text"
    return "max_new_tokens" if tokens.shape[1] == options["max_new_tokens"] else "max_time"


def _classify(lm: LM, prompts: EncodedInputs, request: TaskRequest) -> TaskOutcome:
    """Generate nothing: one step that explains the tokens that are likely next."""
    logits, width = last_logits(lm, prompts), prompts.ids.shape[1]
    best = logits.argmax(1)

    def relevance() -> Steps:
        if not request.settings.explained(1):
            return
        initial = request.initial.at_last_logits(prompts, logits)
        result, _ = relevance_of_logits(PropagationRun(lm, request.rule, prompts, width), initial)
        yield 0, int(best[0]) if len(best) == 1 else best, result

    return TaskOutcome(
        ids=prompts.ids,
        prompt=width,
        lengths=np.zeros(len(logits), np.int64),
        read=prompts,
        columns=range(width, width + 1),
        scores=[logits],
        relevance=relevance(),
        stopped="the task",
    )


def last_logits(lm: LM, inputs: EncodedInputs) -> Float[np.ndarray, "B V"]:
    """The logits behind the last token of each row."""
    tokens, valid = inputs.left(lm.config.pad_id)
    return np.asarray(lm(tokens, valid=valid)[:, -1])


def layer_outputs(lm: LM, inputs: EncodedInputs) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The values that enter and that leave every node, in the columns of the inputs; zero at padding.

    The mask is among the values that enter, as ``"attention_mask"``.
    """
    tokens, valid = inputs.left(lm.config.pad_id)
    values = jax.device_get(capture.node_values(lm.flat, tokens, valid))
    columns = {name: inputs.in_columns(x, inputs.ids.shape[1]) for name, x in values.items()}
    entering, leaving = capture.by_node(columns, inputs.ids, lm.config.num_layers)
    return entering | {"attention_mask": inputs.valid.astype(np.int64)}, leaving


def first_columns(values: dict[str, np.ndarray], columns: int) -> dict[str, np.ndarray]:
    """The first ``columns`` columns of every node's values."""
    return {name: x[:, :columns] for name, x in values.items()}
