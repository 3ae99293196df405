"""DLBacktrace's sampler: an object that generates, and explains if it is asked to."""

from typing import Any

import numpy as np

from moejax.dlbacktrace.api import Backtrace

_NOT_RETURNED = ("output_attentions", "output_hidden_states")


class DLBAutoSampler:
    """Generation with the arguments of ``transformers``' ``generate``; :meth:`Backtrace.run_task` in another form.

    Args:
        dlb: the engine.
        tokenizer: gives special tokens; by default the model's tokenizer.
    """

    def __init__(self, dlb: Backtrace, tokenizer: Any = None) -> None:
        self.dlb, self.tokenizer = dlb, tokenizer

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        return_scores: bool = False,
        return_relevance: bool = False,
        **options: Any,
    ) -> Any:
        """Token ids ``[B T]`` of prompts and answers.

        Args:
            input_ids: token ids of one prompt or several.
            attention_mask: zeros at padding, on the left or on the right.
            return_scores: return a pair with the list of scores ``[B V]`` that each token was chosen from.
            return_relevance: return a pair with the dictionary of results, ``relevance_trace`` among them.
            options: others of :meth:`Backtrace.run_task`.

        Raises:
            TypeError: an unknown option.
            MoejaxError: a value out of range, or inputs that cannot be read.
        """
        unknown = [name for name in _NOT_RETURNED if options.pop(name, False)]
        if unknown:
            raise TypeError(f"{unknown[0]}: use return_layerwise_output=True, or moejax.LM.run_with_cache.")
        wanted = {"return_scores": return_scores, "return_relevance": return_relevance}
        results = self.dlb.sample_auto(self.tokenizer, input_ids, attention_mask, **wanted, **options)
        ids: np.ndarray = results["generated_ids"]
        if return_relevance or options.get("return_layerwise_output"):
            return ids, results
        return (ids, results["scores_trace"]) if return_scores else ids
