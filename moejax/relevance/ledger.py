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

    def __str__(self) -> str:
        """A table for each target: what each layer's operations kept of the target, and what remains."""
        return "\n\n".join(self._table(n) for n in range(len(self.target)))

    def _table(self, n: int) -> str:
        names = list(self.leaks)
        kept = sum(leak[n].sum() for leak in self.leaks.values())
        title = f"target {self.target[n]:.4f} = tokens {self.tokens[n]:.4f} + leaks {kept:.4f}"
        lines = [f"{title} + residual {self.residual[n]:.1e}"]
        if names:
            rows = np.stack([self.leaks[name][n] for name in names], axis=-1)
            labels = [*range(len(rows) - 1), "head", "sum"]
            lines.append(f"{'layer':>6}" + "".join(f"{name:>12}" for name in names))
            for label, row in zip(labels, [*rows, rows.sum(0)], strict=True):
                lines.append(f"{label:>6}" + "".join(f"{value:12.4f}" for value in row))
        return "\n".join(lines)
