"""Relevance of the routed experts of all layers, and what can be computed from it."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from moejax.errors import MoejaxError


@dataclass(frozen=True, repr=False)
class ExpertRelevance:
    """Relevance of the experts of one kind, feed-forward or attention.

    Attributes:
        slots: relevance of each routed slot's weighted output.
        ids, weights: expert and routing weight of each slot; id -1 in layers that are no mixture.
        count: number E of experts of a layer.
        of_tokens: each column T is one token; false if it is several, merged by :meth:`Relevance.aggregate`.
    """

    slots: Float[np.ndarray, "N L T K"]
    ids: Int[np.ndarray, "L T K"]
    weights: Float[np.ndarray, "L T K"]
    count: int
    of_tokens: bool = True

    def by_expert(self, how: str = "sum") -> Float[np.ndarray, "N L E"]:
        """Sum the relevance of each expert of each layer over the tokens routed to it.

        Args:
            how: ``"sum"`` (signed, as the ledger counts), ``"absolute"`` (sum of absolute values), ``"positive"`` (sum
                of positive parts), ``"count"`` (number of slots whose weight is not zero), ``"mean"`` (sum over
                count). They rank experts differently, since frequent experts collect more relevance.

        Raises:
            MoejaxError: ``how`` is another word.
        """
        ways = {
            "sum": self.slots,
            "absolute": np.abs(self.slots),
            "positive": self.slots.clip(0),
            "count": np.broadcast_to(self.weights != 0, self.slots.shape).astype(self.slots.dtype),
        }
        if how == "mean":
            return self.by_expert() / self.by_expert("count").clip(1)
        if how not in ways:
            raise MoejaxError(f"how={how!r} is unknown; choose from {', '.join([*ways, 'mean'])}.")
        return self._scatter(ways[how], 2)

    def by_token(self) -> Float[np.ndarray, "N L T E"]:
        """Return the relevance of each expert for each token; zero where it was not selected."""
        return self._scatter(self.slots, 3)

    def _scatter(self, slots: Float[np.ndarray, "N L T K"], kept: int) -> Float[np.ndarray, "N L *t E"]:
        """Sum by expert over all axes but the first ``kept``; two slots of a token may have one expert."""
        shape, places = slots.shape[:kept], self.count + 1
        rows = np.arange(math.prod(shape)).reshape(*shape, *[1] * (slots.ndim - kept))
        # id -1 adds to the last place, which belongs to no expert
        where = rows * places + self.ids % places
        sums = np.bincount(where.ravel(), slots.ravel(), rows.size * places)
        return sums.reshape(*shape, places)[..., :-1].astype(slots.dtype)

    def drop_renormalise(self) -> Float[np.ndarray, "N L T K"]:
        """Estimate to first order what the target loses if a slot's expert is dropped and the other weights make up.

        The estimate is ``(R_k - w_k R) / (1 - w_k)`` with ``R`` the relevance of all slots of the token and ``w`` the
        weights over their sum. Nothing makes up for a token's only expert; its score is its relevance.

        Raises:
            MoejaxError: tokens were merged.
        """
        self._require_tokens("drop_renormalise")
        fraction = self._fractions
        total = self.slots.sum(-1, keepdims=True)
        scores = (self.slots - fraction * total) / np.where(fraction < 1, 1 - fraction, 1)
        return np.where(fraction < 1, scores, self.slots)

    def advantage(self) -> Float[np.ndarray, "N L T K"]:
        """Compare a slot's expert, before its weight, with the mixture that it belongs to.

        The result ``R_k / w_k - R / sum w`` is positive for experts that are better for the target than the mixture;
        weighted by ``w`` it sums to zero.

        Raises:
            MoejaxError: tokens were merged.
        """
        self._require_tokens("advantage")
        weights = np.where(self.weights == 0, 1, self.weights)
        mixture = self.slots.sum(-1, keepdims=True) / np.where(self._sum == 0, 1, self._sum)
        return np.where(self.weights == 0, 0, self.slots / weights - mixture)

    def sensitivity(self) -> Float[np.ndarray, "N L T K"]:
        """Differentiate the target by a selected expert's router logit, with all else held constant.

        The result is ``R_k - w_k R``, where ``w`` are the routing weights themselves, a softmax over the selected
        experts or over all experts.

        Raises:
            MoejaxError: tokens were merged.
        """
        self._require_tokens("sensitivity")
        return self.slots - self.weights * self.slots.sum(-1, keepdims=True)

    def _require_tokens(self, method: str) -> None:
        """Raise ``MoejaxError`` if tokens were merged: a router weighs the experts of one token."""
        if not self.of_tokens:
            raise MoejaxError(f"{method} compares the experts of single tokens; call it before aggregate.")

    @property
    def _sum(self) -> np.ndarray:
        return self.weights.sum(-1, keepdims=True)

    @property
    def _fractions(self) -> np.ndarray:
        """Weights over the sum of the token's weights."""
        return self.weights / np.where(self._sum == 0, 1, self._sum)

    def __repr__(self) -> str:
        """Sizes."""
        n, layers, tokens, slots = self.slots.shape
        return f"ExpertRelevance(N={n}, L={layers}, T={tokens}, K={slots}, E={self.count})"
