"""DLBacktrace's interface: one object that generates, explains every step, and draws."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from moejax.dlbacktrace import devices, evaluation, nodes, relevance_trace, results
from moejax.dlbacktrace.initial_relevance import InitialRelevance, check_task, find_rule
from moejax.dlbacktrace.inputs import read_inputs
from moejax.dlbacktrace.model_type import check_model_type
from moejax.dlbacktrace.propagation import StepRelevance
from moejax.dlbacktrace.relevance_trace import CachePolicy
from moejax.dlbacktrace.settings import BacktraceSettings
from moejax.dlbacktrace.tasks import Returned, TaskRequest, carry_out, layer_outputs
from moejax.dlbacktrace.visuals import Visuals
from moejax.errors import MoejaxError
from moejax.lm import LM, load
from moejax.relevance.ledger import Ledger

Outputs = dict[str, np.ndarray]
"""Arrays by the names of nodes."""


class Backtrace(Visuals):
    """Generation with the relevance of every step, under the names of DLBacktrace.

    Attributes:
        model: the :class:`moejax.LM`; ``None`` once it is unloaded.
        model_type: name of the model's family.
        device, init_device: where it computes, and where its weights wait for the first call.
        layer_stack: names of all ``3 + 6 L`` nodes, the output first.
        model_resource: ``layers``, ``graph``, ``outputs`` and ``inputs``, by name.
        all_wt: relevance of the last explained step at each node, ``[B T D]`` (``[B T V]`` at the head).
        all_layer_expert_relevance: that step's relevance of each mixture's experts, ``[T E]`` or ``[B T E]``.
        ledger: where the relevance of that step came from and where it went.
        all_out_model: values that left each node in the last call of :meth:`compute_outputs`, by step.
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
            activation_dict: not needed and not read: the model's family determines its activations.
            model_type: name of the model's family; an error if the model is of another.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"gpu"``; by default the model's device, or JAX's default.
            init_device: where the weights wait until they are first needed; by default on ``device``.
            dtype: dtype of the weights if ``model`` is loaded; by default the checkpoint's.
            max_length: most tokens of a prompt and its answer together.

        Raises:
            ConfigError: a model that is not supported, or of another family.
            MoejaxError: an unknown device, or an index beyond the last device.
        """
        if activation_dict:
            warnings.warn("activation_dict is not needed: the model's family determines its activations.", stacklevel=2)
        model = getattr(model, "module", model)
        check_model_type(model, model_type)
        self._device = devices.find_device(device)
        waiting = self._device if init_device is None else devices.find_device(init_device)
        with devices.default_device(waiting):
            lm = model if isinstance(model, LM) else load(model, dtype=dtype)
        self._lm: LM | None = devices.move(lm, waiting)
        self.device = devices.device_name(self._device, self._lm)
        self.init_device = devices.device_name(waiting, self._lm)
        self.model_type, self.max_length = lm.config.model_type, max_length
        self.relevance_dtype = np.dtype(np.float32)
        graph = nodes.graph(lm.config)
        self.layer_stack = nodes.stack(lm.config.num_layers)
        ends = {"outputs": [nodes.HEAD], "inputs": [nodes.EMBEDDINGS]}
        self.model_resource: dict[str, Any] = {"layers": self.layer_stack, "graph": graph, **ends}
        self._generated: np.ndarray | None = None
        self._predicted: Outputs = {}
        self._last_request: TaskRequest | None = None
        self.clear_intermediates()

    @property
    def model(self) -> LM | None:
        """The model."""
        return self._lm

    @property
    def model_weights(self) -> dict[str, Any]:
        """The parameters of each node that has parameters."""
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
        """Generate, and explain every new token by the tokens before it.

        All steps are read from one forward pass over prompt and answer; of a beam search, over the answer that is
        returned. Arrays have a row for each prompt, in the columns in which the prompts were given. Relevance is zero
        at padding and behind a row's end. The classification tasks return ``predictions``, the logits ``[B V]``.

        Args:
            task: ``"generation"``, which is what ``"auto"`` stands for with these models; ``"binary-classification"``
                or ``"multi-class-classification"`` generate nothing and explain the tokens that are likely next.
            inputs: a text or several, a mapping with ``input_ids`` and ``attention_mask``, the pair of them, or ids.
            tokenizer: for texts, special tokens and figures; by default the model's tokenizer.
            mode: ``"default"``, DLBacktrace's proportional rule, or a rule or its name in ``moejax.rules.RULES``.
            multiplier: relevance of each explained logit.
            scaler: the sum to which every node's relevance is rescaled; 0 does not rescale.
            thresholding: in classification, the probability above which a token is explained.
            temperature: temperature of the draw; 1 takes the best token unless ``top_k``, ``top_p`` or ``do_sample``
                ask for a draw.
            return_scores: return ``scores_trace``: the scores ``[B V]`` that each step's token was chosen from.
            return_relevance: return ``relevance_trace``: for each explained step ``step_index``, ``token_id``,
                ``ledger``, ``all_wt`` and ``expert_relevance``; and ``relevance``, the last step's ``all_wt``.
            return_layerwise_output: return ``layerwise_output_trace``: the values in and out of each node by step.
            relevance_cache_policy: what ``relevance_trace`` keeps of a step: ``"full"``, ``"summary"``, ``"disk"`` or
                ``"none"`` (:class:`~moejax.dlbacktrace.relevance_trace.CachePolicy`). The last step is in attributes.
            relevance_cache_dir: folder for ``"disk"``, in which each run makes a folder of its own.
            debug: print why the generation ended.
            generation_kwargs: the fields of :class:`~moejax.dlbacktrace.settings.BacktraceSettings`.

        Raises:
            TypeError: an unknown option.
            MoejaxError: an unknown task, mode or policy, a value out of range, or inputs that cannot be read.
        """
        settings = BacktraceSettings.from_options(generation_kwargs, tokenizer)
        cache = CachePolicy(relevance_cache_policy, relevance_cache_dir)
        initial = InitialRelevance(check_task(task), multiplier, thresholding)
        returned = Returned(return_scores, return_relevance, return_layerwise_output)
        request = TaskRequest(initial, find_rule(mode), settings, temperature, self.max_length, returned, cache, scaler)
        return self._run(request, inputs, tokenizer, debug)

    def _run(self, request: TaskRequest, inputs: Any, tokenizer: Any, debug: bool) -> dict[str, Any]:
        self.clear_intermediates()
        self._last_request = request
        with self._running() as lm:
            outcome = carry_out(lm, read_inputs(inputs, tokenizer, lm, request.settings.bos_token_id), request)
            self._generated = outcome.ids
            task_results = results.assemble(lm, outcome, request, keep=self._keep)
        if debug:
            print(f"{outcome.ids.shape[1] - outcome.prompt} tokens generated; stopped by {outcome.stopped}")
        return task_results

    def sample_auto(
        self, tokenizer: Any = None, input_ids: Any = None, attention_mask: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Run :meth:`run_task` on token ids, with any of its options.

        Raises:
            TypeError: an unknown option.
            MoejaxError: a value out of range, or inputs that cannot be read.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.run_task(inputs=inputs, tokenizer=tokenizer, **options)

    def compute_outputs(
        self,
        *,
        input_text: Any = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        input_ids: Any = None,
        attention_mask: Any = None,
    ) -> tuple[dict[str, Outputs], dict[str, Outputs], list[list[int]]]:
        """Generate greedily; return the values that left and that entered each node at each step, and the new tokens.

        The values are by the number of the step, ``"0"`` and so on. :meth:`eval` takes the values of a step.

        Args:
            max_length: most new tokens; 50 by default.

        Raises:
            MoejaxError: inputs that cannot be read.
        """
        settings = BacktraceSettings.from_options({"max_new_tokens": max_length}, tokenizer)
        request = TaskRequest(InitialRelevance(), find_rule("default"), settings, max_length=self.max_length)
        with self._running() as lm:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask} if input_text is None else input_text
            outcome = carry_out(lm, read_inputs(inputs, tokenizer, lm, settings.bos_token_id), request)
            by_step = results.layerwise_outputs(lm, outcome)
        all_out, all_in = ({str(i): values[name] for i, values in enumerate(by_step)} for name in ("all_out", "all_in"))
        self.all_out_model = all_out
        return all_out, all_in, outcome.answers

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

        Relevance depends on the token ids only: they are read from ``all_in``, and all values are computed again.

        Args:
            all_in: values that enter each node, at least the ids at ``decoder_embeddings``; of several steps, the last.
            all_out: values that leave each node. Logits in it must be this model's.
            mode: ``"default"``, DLBacktrace's proportional rule, or a rule or its name in ``moejax.rules.RULES``.
            start_wt: relevance of each logit to start from, ``[B T V]``, in place of the following.
            multiplier, thresholding, task: see :class:`~moejax.dlbacktrace.initial_relevance.InitialRelevance`.
            scaler: the sum to which every node's relevance is rescaled; 0 does not rescale.
            max_unit: the largest absolute value of a node, above which it is scaled down; 0 sets no limit.
            predicted_token: the token to explain, whatever the task.
            device: where to compute; by default on ``self.device``.

        Raises:
            MoejaxError: an unknown task or mode, no tokens, logits of another model, or ``start_wt`` of another shape.
        """
        rule, initial = find_rule(mode), InitialRelevance(check_task(task), multiplier, thresholding)
        entering, leaving = evaluation.last_step(all_in), evaluation.last_step(all_out)
        evaluation.check_token_ids(entering)
        with self._running(device) as lm:
            relevance = evaluation.evaluate(lm, entering, leaving, rule, initial, start_wt, predicted_token)
        self._keep(relevance.rescaled(scaler, max_unit))
        return self.all_wt

    def proportional_eval(
        self, all_in: Mapping[str, Any], all_out: Mapping[str, Any] | None = None, **options: Any
    ) -> Outputs:
        """Run :meth:`eval` with DLBacktrace's proportional rule and any of its other options.

        Raises:
            MoejaxError: as in :meth:`eval`.
        """
        return self.eval(all_in, all_out, "default", **options)

    def predict(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        temperature: float | int = 1.0,
        tokenizer: Any = None,
        debug: bool = False,
    ) -> dict[str, Outputs]:
        """Values of one forward pass: ``input_values`` and ``output_values`` of every node, by its name.

        Under ``"output"`` stand the logits over the temperature ``[B T V]``, whose softmax is the probability of each
        token. A temperature divides these alone: values of nodes are the model's, and so is :meth:`evaluation`.

        Args:
            input_ids: token ids, a text, or several texts.
            temperature: above 1, probabilities become more even.
            debug: not needed and not read.

        Raises:
            MoejaxError: a temperature that is not positive, or inputs that cannot be read.
        """
        if not 0 < temperature < float("inf"):
            raise MoejaxError(f"temperature={temperature} must be positive.")
        with self._running() as lm:
            inputs = input_ids if attention_mask is None else (input_ids, attention_mask)
            entering, leaving = layer_outputs(lm, read_inputs(inputs, tokenizer, lm))
        self._predicted = entering
        found = results.node_io(entering, leaving)
        return found | {"output": {"output_values": leaving[nodes.HEAD] / np.float32(temperature)}}

    def evaluation(self, mode: Any = "default", **options: Any) -> Outputs:
        """:meth:`eval` of the pass that :meth:`predict` ran last, for the best token behind it.

        Args:
            options: those of :meth:`eval`.

        Raises:
            MoejaxError: there was no such pass, or as in :meth:`eval`.
        """
        if not self._predicted:
            raise MoejaxError("there is nothing to evaluate: call predict first, or eval with values of your own.")
        options.setdefault("task", "generation")
        return self.eval(self._predicted, None, mode, **options)

    @staticmethod
    def load_step(path: str | Path) -> dict[str, Any]:
        """``all_wt`` and ``expert_relevance`` of a step, from the file that its trace entry names.

        Raises:
            MoejaxError: the file is missing or was not written by a run.
        """
        return relevance_trace.load_step(path)

    def clear_intermediates(self, clear_relevance: bool = True, clear_weight_cache: bool = False) -> None:
        """Drop the last call's values and relevance from the attributes; returned results are not changed.

        Args:
            clear_relevance: drop the relevance too.
            clear_weight_cache: free all compiled programs of this process, other models' too.
        """
        self.all_out_model: dict[str, Outputs] = {}
        if clear_relevance:
            self._keep(StepRelevance({}, {}, Ledger(np.zeros(0), np.zeros(0), {})))
        if clear_weight_cache:
            jax.clear_caches()

    def close(self, unload_model: bool = False) -> None:
        """Drop all that was computed, with ``unload_model`` the model too; returned results are not changed."""
        self.clear_intermediates()
        self._generated = self._last_request = None
        self._predicted = {}
        if unload_model:
            self._lm = None

    def __repr__(self) -> str:
        config, request = self._lm and self._lm.config, self._last_request
        experts = f"{config.num_experts} experts" if config and config.num_experts else "dense"
        size = f"{config.num_layers} layers, {experts}" if config else "unloaded"
        limit = "" if self.max_length is None else f", max_length={self.max_length}"
        task = f", task={request.initial.task!r}, rule={request.rule!r}" if request else ""
        return f"Backtrace({self.model_type}, {size}, device={self.device!r}{limit}{task})"

    def _keep(self, relevance: StepRelevance) -> None:
        """Make ``relevance`` the last explained step, which the attributes show."""
        self.all_wt, self.all_layer_expert_relevance, self.ledger = relevance.nodes, relevance.experts, relevance.ledger

    def _need_lm(self) -> LM:
        if self._lm is None:
            raise MoejaxError("the model was unloaded by close(unload_model=True): make a new Backtrace.")
        return self._lm

    @contextmanager
    def _running(self, device: Any = None) -> Iterator[LM]:
        """Yield the model on its device, or for this call only on ``device``."""
        lm = self._need_lm()
        if device is not None:
            chosen = devices.find_device(device)
            lm = devices.move(lm, chosen)
        else:
            chosen = self._device
            lm = self._lm = devices.move(lm, chosen)
        with devices.default_device(chosen):
            yield lm
