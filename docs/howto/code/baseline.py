"""Leave one out: what the target loses if one token's embedding is zero (occlusion, by token)."""

from moejax import LM, Argmax, Cell, ablate, explain
from moejax.relevance import Scores, Target, register_baseline


@register_baseline("leave-one-out")
def leave_one_out(lm: LM, prompt: str | list[int], *, target: Target = Argmax()) -> Scores:
    """The measured drop of each target when one token's embedding is zero; in the target's units.

    One forward pass for each token, many of them in one batch. The scores do not add up to the target.

    Raises:
        PromptError: as in :func:`moejax.explain`.
    """
    # one explanation resolves the target: it knows the sequence, the positions and the labels
    resolved = explain(lm, prompt, target=target)
    cells = [Cell.token(position) for position in range(len(resolved.token_ids))]
    drops = ablate(lm, prompt, cells=cells, target=target)  # [M N]: an intervention for each token
    return Scores(
        method="leave one out",
        unit="the target's",
        labels=resolved.labels,
        positions=resolved.positions,
        token_ids=resolved.token_ids,
        pieces=resolved.pieces,
        tokens=drops.T,
    )


if __name__ == "__main__":
    import numpy as np

    import moejax

    lm = moejax.load("tiny-olmoe")
    prompt = "And the LORD said unto"
    scores = leave_one_out(lm, prompt)
    relevance = moejax.explain(lm, prompt)
    assert scores.tokens is not None
    assert scores.tokens.shape == relevance.tokens.shape
    for piece, drop, share in zip(scores.pieces, scores.tokens[0], relevance.tokens[0], strict=True):
        print(f"{piece!r:12} without it {drop:7.3f}   relevance {share:7.3f}")
    print("correlation:", np.corrcoef(scores.tokens[0], relevance.tokens[0])[0, 1])
