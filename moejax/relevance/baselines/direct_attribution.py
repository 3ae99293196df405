"""Direct logit attribution: the part of a target that each component writes itself."""

from dataclasses import replace
from typing import Any

from moejax.lm import LM, Prompt
from moejax.relevance.baselines.scores import Scores, register_baseline
from moejax.relevance.explain import explain
from moejax.relevance.targets import Argmax, TargetLike
from moejax.rules import Direct


@register_baseline("direct")
def direct_logit_attribution(lm: LM, prompt: Prompt, *, target: TargetLike = Argmax(), **options: Any) -> Scores:
    """Compute each component's output times the target's direction, through the final norm's frozen scale, in logits.

    It is the logit lens for components (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021), and
    the special case ``c_y = W_U`` of relevance: it sees no path through a later layer. The full result, with its ledger
    and each layer's stream, is ``explain(.., rule=Direct())``. ``gap`` is the part that biases and dense layers write.

    Args:
        options: further options of :func:`moejax.explain`.

    Raises:
        PromptError, MoejaxError: as in :func:`moejax.explain`.
    """
    relevance = explain(lm, prompt, target=target, rule=Direct(), **options)
    scores = Scores(
        method="direct logit attribution",
        unit="logits",
        labels=relevance.labels,
        positions=relevance.positions,
        token_ids=relevance.token_ids,
        pieces=relevance.pieces,
        tokens=relevance.tokens,
        feed_forward=relevance.feed_forward,
        attention=relevance.attention,
        heads=relevance.heads,
        shared=relevance.shared,
    )
    return replace(scores, gap=relevance.ledger.target - scores.total())
