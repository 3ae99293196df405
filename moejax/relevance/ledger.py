"""The closed ledger: what went in, what came out, every named leak."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Ledger:
    """``target = tokens + sum of leaks + residual``, where every operation that does not conserve is named.

    A rule names the operations at which it does not conserve; each is measured where it happens, as relevance of its
    outputs minus relevance of its inputs. Everything else must conserve, so the residual is zero up to rounding, and is
    not if a rule, gate or kernel outside the named operations is wrong. What goes wrong inside one changes its entry.

    Attributes:
        target: the explained logit or difference of logits.
        tokens: sum of the relevance of all input tokens.
        leaks: by operation; the last row is the final norm and head.
    """

    target: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]
    leaks: dict[str, Float[np.ndarray, "N L1"]]

    @property
    def residual(self) -> Float[np.ndarray, " N"]:
        """What is not accounted for."""
        return (
            self.target - self.tokens - sum((leak.sum(-1) for leak in self.leaks.values()), np.zeros_like(self.target))
        )
