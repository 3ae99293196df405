"""DLBacktrace's interface: one object that generates, explains every step, and draws."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from moejax.checkpoints import get_model_config, list_supported_models
from moejax.dlbacktrace import devices, figures, initial_relevance, nodes, trace
from moejax.dlbacktrace.inputs import read, to_numpy
from moejax.dlbacktrace.propagation import Run, StepRelevance, of_weights
from moejax.dlbacktrace.settings import Settings
from moejax.dlbacktrace.tasks import Question, answer, last_logits, last_of, layer_outputs, up_to
from moejax.errors import ConfigError, MoejaxError
from moejax.lm import LM, load
from moejax.relevance.ledger import Ledger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outputs = dict[str, np.ndarray]
"""Arrays by node."""


class Backtrace:
    """Generation with the relevance of every step, under the names of DLBacktrace.

    Attributes:
        model: the :class:`moejax.LM`; ``None`` once unloaded.
        model_type: its family.
        device, init_device: where it computes, and where its weights wait for the first call.
        layer_stack: names of all ``3 + 6 L`` nodes, the output first.
        model_resource: ``layers``, ``graph``, ``outputs`` and ``inputs``, by name.
        all_wt: relevance of the last explained step at each node, ``[B T D]`` (``[B T V]`` at the head).
        all_layer_expert_relevance: that of each mixture's experts, ``[T E]``, with several rows ``[B T E]``.
        ledger: its books.
        all_out_model: what left each node in the last call of :meth:`compute_outputs`, by step.
    """

    impl = "jax"

    def __init__(
        self,
        model: Any,
        activation_dict: Mapping[str, str] | None = None,
        model_type: str | None = None,
        device: Any = None,
        init_device: Any = None,
        *,
        dtype: DTypeLike | None = None,
        max_length: int | None = None,
    ) -> None:
        """
        Args:
            model: a :class:`moejax.LM`, a ``transformers`` model in memory, a folder, or a name.
            activation_dict: not needed: activations are those of the model's family.
            model_type: checked against the model's own.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"gpu"``; by default where the model is, or JAX's default.
            init_device: where the weights wait until they are first needed; by default at once on ``device``.
            dtype: of weights that are loaded here; by default the checkpoint's.
            max_length: most tokens of a prompt and its answer together.

        Raises:
            ConfigError: the model is not supported, or of another type.
            MoejaxError: another device, or one that is not there.
        """
        if activation_dict:
            warnings.warn("activation_dict is not needed: activations are those of the model's family.", stacklevel=2)
        model = getattr(model, "module", model)
        _check_type(model, model_type)
        self._device = devices.pick(device)
        waiting = self._device if init_device is None else devices.pick(init_device)
        with devices.default(waiting):
            lm = model if isinstance(model, LM) else load(model, dtype=dtype)
        self._lm: LM | None = devices.moved(lm, waiting)
        self.device, self.init_device = devices.name(self._device, self._lm), devices.name(waiting, self._lm)
        self.model_type, self.max_length = lm.config.model_type, max_length
        self.relevance_dtype = np.dtype(np.float32)
        graph = nodes.graph(lm.config)
        self.layer_stack = nodes.stack(lm.config.num_layers)
        ends = {"outputs": [nodes.HEAD], "inputs": [nodes.EMBEDDINGS]}
        self.model_resource: dict[str, Any] = {"layers": self.layer_stack, "graph": graph, **ends}
        self._generated: np.ndarray | None = None
        self.clear_intermediates()

    @property
    def model(self) -> LM | None:
        """The model."""
        return self._lm

    @property
    def model_weights(self) -> dict[str, Any]:
        """The parameters of each node that has any."""
        return nodes.weights(self._need_lm().decoder)

    def run_task(
        self,
        task: str = "generation",
        inputs: Any = None,
        tokenizer: Any = None,
        mode: Any = "default",
        multiplier: float | int = 100.0,
        scaler: float | int = 0.0,
        thresholding: float | int = 0.5,
        temperature: float | int | None = 1.0,
        return_scores: bool = False,
        return_relevance: bool = False,
        return_layerwise_output: bool = False,
        relevance_cache_policy: str = "full",
        relevance_cache_dir: Any = "./relevance_cache",
        debug: bool = False,
        **generation_kwargs: Any,
    ) -> dict[str, Any]:
        """Generate, and explain every token by what stands before it.

        All steps are read from one forward pass over prompt and answer. With several prompts, arrays have a row for
        each, in the columns in which the prompts were given; relevance is zero at padding and behind a row's end.

        Args:
            task: ``"generation"``; ``"binary-classification"`` or ``"multi-class-classification"`` generate nothing
                and explain the tokens that are likely next.
            inputs: a text or several, a mapping with ``input_ids`` and ``attention_mask``, the pair of them, or ids.
            tokenizer: for texts, its special tokens and figures; by default the model's own.
            mode: ``"default"``, DLBacktrace's proportional rule, or a rule or its name in ``moejax.rules.RULES``.
            multiplier: relevance of each explained logit at the start.
            scaler: if not zero, every node's relevance is rescaled to this sum.
            thresholding: in classification, the probability above which a token is explained.
            temperature: of the draw; 1 alone takes the best token (:class:`Settings`).
            return_scores: ``scores_trace``, for each step what its token was chosen from, ``[B V]``.
            return_relevance: ``relevance_trace``, for each explained step ``step_index``, ``token_id``, ``ledger``,
                ``all_wt`` and ``expert_relevance``.
            return_layerwise_output: ``layerwise_output_trace``, for each step the values in and out of each node.
            relevance_cache_policy: ``"full"``; ``"summary"`` keeps the nodes' and experts' sums in place of arrays,
                ``"disk"`` these and the ``path`` of a file for :meth:`load_step`, ``"none"`` nothing. The last
                explained step is kept in the attributes by all of them.
            relevance_cache_dir: where files are written, in a new folder for each run.
            debug: print why the generation ended.
            generation_kwargs: the fields of :class:`~moejax.dlbacktrace.settings.Settings`.

        Raises:
            TypeError: an option that does not exist.
            MoejaxError: an unknown task, mode or policy, a value out of range, inputs that cannot be read.
        """
        settings = Settings.of(generation_kwargs, tokenizer)
        kept = trace.check(relevance_cache_policy)
        question = Question(
            task=initial_relevance.check_task(task),
            rule=initial_relevance.rule_of(mode),
            settings=settings,
            multiplier=multiplier,
            thresholding=thresholding,
            temperature=temperature,
            max_length=self.max_length,
            return_scores=return_scores,
            only_last=kept == "none",
        )
        self.clear_intermediates()
        with self._running() as lm:
            outcome = answer(lm, read(inputs, tokenizer, lm, settings.bos_token_id), question)
            self._generated = outcome.ids
            results: dict[str, Any] = {"task": question.task, "generated_ids": outcome.ids}
            if return_scores:
                results["scores_trace"] = outcome.scores
            if return_relevance:
                found = trace.Trace(kept, relevance_cache_dir)
                for step, token, relevance in outcome.relevance:
                    self._set(relevance.rescaled(scaler, 0.0))
                    found.add(step, token, self._last)
                results["relevance_trace"] = found.entries
            if return_layerwise_output:
                entering, leaving = layer_outputs(lm, outcome.read)
                results["layerwise_output_trace"] = [
                    {"all_in": up_to(entering, n), "all_out": up_to(leaving, n)} for n in outcome.columns
                ]
        if debug:
            print(f"{outcome.ids.shape[1] - outcome.prompt} tokens generated; stopped by {outcome.stopped}")
        return results

    def sample_auto(
        self, tokenizer: Any = None, input_ids: Any = None, attention_mask: Any = None, **options: Any
    ) -> dict[str, Any]:
        """:meth:`run_task` on token ids, with any of its options.

        Raises:
            TypeError: an option that does not exist.
            MoejaxError: a value out of range, inputs that cannot be read.
        """
        return self.run_task(
            inputs={"input_ids": input_ids, "attention_mask": attention_mask}, tokenizer=tokenizer, **options
        )

    def compute_outputs(
        self,
        *,
        input_text: Any = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        input_ids: Any = None,
        attention_mask: Any = None,
    ) -> tuple[dict[str, Outputs], dict[str, Outputs], list[list[int]]]:
        """Generate greedily and return what left and what entered each node at each step, and the new tokens.

        The first two are by step, ``"0"`` and so on; a step's are what :meth:`eval` takes.

        Args:
            max_length: most tokens to generate; 50 by default.

        Raises:
            MoejaxError: inputs that cannot be read.
        """
        settings = Settings.of({"max_new_tokens": max_length}, tokenizer)
        question = Question("generation", initial_relevance.rule_of("default"), settings, max_length=self.max_length)
        with self._running() as lm:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask} if input_text is None else input_text
            outcome = answer(lm, read(inputs, tokenizer, lm, settings.bos_token_id), question)
            entering, leaving = layer_outputs(lm, outcome.read)
        by_step = [
            {str(i): up_to(outputs, n) for i, n in enumerate(outcome.columns)} for outputs in (leaving, entering)
        ]
        self.all_out_model = by_step[0]
        rows = zip(outcome.ids[:, outcome.prompt :].tolist(), outcome.lengths, strict=True)
        return by_step[0], by_step[1], [row[:length] for row, length in rows]

    def eval(
        self,
        all_in: Mapping[str, Any],
        all_out: Mapping[str, Any] | None = None,
        mode: Any = "default",
        start_wt: Any = (),
        multiplier: float | int = 100.0,
        scaler: float | int = 0.0,
        max_unit: float | int = 0.0,
        predicted_token: Any = None,
        thresholding: float | int = 0.5,
        task: str = "binary-classification",
        device: Any = None,
    ) -> Outputs:
        """Relevance at every node of one step, from that step's values (:meth:`compute_outputs`).

        Relevance depends on the tokens only: they are read from ``all_in``, and the rest is computed again.

        Args:
            all_in: what enters each node, at least the ids at ``decoder_embeddings``; of several steps, the last.
            all_out: what leaves each node; logits in it must be this model's.
            mode: ``"default"``, DLBacktrace's proportional rule, or a rule or its name in ``moejax.rules.RULES``.
            start_wt: relevance of each logit to start from, ``[B T V]``, in place of ``multiplier`` at one token.
            multiplier: relevance at the start.
            scaler: if not zero, every node's relevance is rescaled to this sum.
            max_unit: if not zero, a node with a larger absolute value is rescaled to have it as the largest.
            predicted_token: the token to explain; by default the best one.
            thresholding: in classification tasks, start from all tokens more probable than this.
            task: ``"generation"`` explains one token, ``"binary-classification"`` and ``"multi-class-classification"``
                those above ``thresholding``, or the best one if there are none.
            device: where to compute; by default where the object does.

        Raises:
            MoejaxError: an unknown task or mode, no tokens, logits of another model, weights of another shape.
        """
        rule, task = initial_relevance.rule_of(mode), initial_relevance.check_task(task)
        all_in, all_out = (_last_step(outputs or {}) for outputs in (all_in, all_out))
        if nodes.EMBEDDINGS not in all_in:
            raise MoejaxError(f"all_in has no token ids at {nodes.EMBEDDINGS!r}: pass what compute_outputs returned.")
        with self._running(device) as lm:
            batch = read((all_in[nodes.EMBEDDINGS], all_in.get("attention_mask")), None, lm)
            logits = last_of(batch, to_numpy(all_out[nodes.HEAD])) if nodes.HEAD in all_out else None
            weights = to_numpy(start_wt).astype(np.float32)
            if weights.size == 0:
                given = last_logits(lm, batch) if logits is None else logits
                options = {"task": task, "multiplier": multiplier, "thresholding": thresholding}
                weights = initial_relevance.start_weights(batch, given, predicted_token=predicted_token, **options)
            weights = weights[None] if weights.ndim == 2 else weights
            found, own = of_weights(Run(lm, rule, batch, batch.ids.shape[1]), weights)
        _check_logits(logits, own, weights)
        self._set(found.rescaled(scaler, max_unit))
        return self.all_wt

    def proportional_eval(
        self, all_in: Mapping[str, Any], all_out: Mapping[str, Any] | None = None, **options: Any
    ) -> Outputs:
        """:meth:`eval` by DLBacktrace's proportional rule, with any of its other options.

        Raises:
            MoejaxError: as :meth:`eval`.
        """
        return self.eval(all_in, all_out, "default", **options)

    @staticmethod
    def load_step(path: str | Path) -> dict[str, Any]:
        """``all_wt`` and ``expert_relevance`` of a step from the file that its trace entry names.

        Raises:
            MoejaxError: it is no such file.
        """
        return trace.load_step(path)

    def visualize_tokenwise_relevance_map(
        self,
        trace: Sequence[dict[str, Any]],
        input_ids: Any,
        tokenizer: Any = None,
        *,
        generated_ids: Any = None,
        input_key: str = nodes.EMBEDDINGS,
        figsize: figures.Size = (12, 6),
        row: int = 0,
    ) -> "Figure":
        """A figure of every token's relevance (rows) for every explained step (columns) of one row of the batch.

        Args:
            input_ids: of the prompts, as they were given.
            generated_ids: name the tokens of steps that were not explained; by default those of the last run.
            input_key: the node whose relevance is shown.

        Raises:
            MoejaxError: an empty trace, one that holds sums only, no such node.
        """
        axes = self._axes(trace, input_ids, generated_ids, row, tokenizer)
        return figures.token_map(trace, axes, input_key, figsize)

    def visualize_input_heatmap_for_token(
        self,
        trace: Sequence[dict[str, Any]],
        n: int,
        input_ids: Any,
        tokenizer: Any = None,
        *,
        generated_ids: Any = None,
        input_key: str = nodes.EMBEDDINGS,
        figsize: figures.Size = (12, 3),
        row: int = 0,
    ) -> "Figure":
        """A figure of every token's relevance for step ``n``, counted from 0; other options as for the map.

        Raises:
            MoejaxError: a step that was not explained, a trace that holds sums only, no such node.
        """
        axes = self._axes(trace, input_ids, generated_ids, row, tokenizer)
        return figures.token_bar(trace, n, axes, input_key, figsize)

    def visualize_dlbacktrace(
        self,
        output_path: str | Path | None = None,
        top_k: int | None = None,
        relevance_threshold: float | int | None = None,
        engine_auto_threshold: int = 1500,
    ) -> "Figure":
        """A figure of the model's nodes with the sum of absolute relevance of each, of the last explained step.

        Args:
            output_path: also save it there, as SVG unless the name ends otherwise.
            top_k: only so many nodes, those with the most.
            relevance_threshold: only nodes with at least so much.
            engine_auto_threshold: more nodes than this are drawn as colours alone, which is quick.

        Raises:
            MoejaxError: nothing was explained yet.
        """
        return figures.node_graph(
            self.all_wt, self.model_resource["graph"], output_path, top_k, relevance_threshold, engine_auto_threshold
        )

    def clear_intermediates(self, clear_relevance: bool = True, clear_weight_cache: bool = False) -> None:
        """Forget the last call's values, and its relevance; what was returned stays as it is.

        Args:
            clear_weight_cache: free compiled programs too.
        """
        self.all_out_model: dict[str, Outputs] = {}
        if clear_relevance:
            self._set(StepRelevance({}, {}, Ledger(np.zeros(0), np.zeros(0), {})))
        if clear_weight_cache:
            jax.clear_caches()

    def close(self, unload_model: bool = False) -> None:
        """Forget everything that was computed, and the model too if ``unload_model``; results stay as they are."""
        self.clear_intermediates()
        self._generated = None
        if unload_model:
            self._lm = None

    def __repr__(self) -> str:
        config = self._lm and self._lm.config
        experts = f"{config.num_experts} experts" if config and config.num_experts else "dense"
        size = f"{config.num_layers} layers, {experts}" if config else "unloaded"
        return f"Backtrace({self.model_type}, {size}, device={self.device!r})"

    def _set(self, found: StepRelevance) -> None:
        self._last = found
        self.all_wt, self.all_layer_expert_relevance, self.ledger = found.nodes, found.experts, found.ledger

    def _axes(
        self, trace: Sequence[dict[str, Any]], input_ids: Any, generated_ids: Any, row: int, tokenizer: Any
    ) -> figures.TokenAxes:
        ids, last = np.atleast_2d(to_numpy(input_ids)), self._generated
        if generated_ids is None and last is not None and row < min(len(ids), len(last)):
            generated_ids = last if np.array_equal(last[row, : ids.shape[1]], ids[row]) else None
        return figures.TokenAxes(trace, ids, generated_ids, row, tokenizer, self._need_lm())

    def _need_lm(self) -> LM:
        if self._lm is None:
            raise MoejaxError("the model was unloaded by close(unload_model=True): make a new Backtrace.")
        return self._lm

    @contextmanager
    def _running(self, device: Any = None) -> Iterator[LM]:
        """The model on its device, or for once on another."""
        lm = self._need_lm()
        if device is not None:
            chosen = devices.pick(device)
            lm = devices.moved(lm, chosen)
        else:
            chosen = self._device
            lm = self._lm = devices.moved(lm, chosen)
        with devices.default(chosen):
            yield lm


def _check_type(model: Any, model_type: str | None) -> None:
    if model_type is None:
        return
    if model_type not in list_supported_models():
        raise ConfigError(f"model_type={model_type!r} is unknown; choose from {', '.join(list_supported_models())}.")
    if (found := get_model_config(model).model_type) != model_type:
        raise ConfigError(f"the model is a {found}, not a {model_type}; leave model_type out to have it detected.")


def _last_step(outputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """One step's values: those of the last, if they are by step."""
    return outputs[max(outputs, key=int)] if outputs and all(name.isdecimal() for name in outputs) else outputs


def _check_logits(
    given: Float[np.ndarray, "B V"] | None, own: Float[np.ndarray, "B V"], weights: Float[np.ndarray, "B T V"]
) -> None:
    """Refuse values that another model or another input gave.

    Raises:
        MoejaxError: the logits differ by more than rounding.
    """
    # the logits at hand are those of the last column that relevance initial_relevance from
    if given is None or not weights[:, -1].any(1).all():
        return
    if given.shape != own.shape or np.abs(given - own).max() > 0.05 * np.abs(own).max():
        raise MoejaxError("all_out holds other logits than this model gives for all_in: they are not of one step.")
