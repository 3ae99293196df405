"""The conservation ledger: the explained value, the relevance of the input, and every named leak between them.

The probes of :mod:`moejax.relevance.engine` measure its numbers; :mod:`moejax.relevance.explain` and
:mod:`moejax.dlbacktrace.propagation` fill it. A new field also goes to what saves and shows a result: ``store.py`` and
``result.py`` (``to_dict``) here, ``schema.py``, ``aggregate.py`` and ``page/ledger.js`` in :mod:`moejax.report`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Ledger:
    """``target = tokens + sum of leaks + residual``, where every operation that does not conserve is named.

    A rule names the operations at which it does not conserve relevance. Each of them is measured where it happens, as
    relevance of its outputs minus relevance of its inputs. All other operations must conserve, so the residual is zero
    up to rounding. It is not zero if a rule, gate or kernel outside the named operations is wrong. A mistake inside a
    named operation changes its entry, not the residual.

    Attributes:
        target: the explained logit or difference of logits.
        tokens: sum of the relevance of all input tokens.
        leaks: relevance lost at each named operation, for each layer; the last row is the final norm and head.
    """

    target: Float[np.ndarray, " N"]
    tokens: Float[np.ndarray, " N"]
    leaks: dict[str, Float[np.ndarray, "N L1"]]

    @property
    def residual(self) -> Float[np.ndarray, " N"]:
        """The part of the target that neither tokens nor leaks account for."""
        return (
            self.target - self.tokens - sum((leak.sum(-1) for leak in self.leaks.values()), np.zeros_like(self.target))
        )

    def __repr__(self) -> str:
        """Names of the leaks and the largest residual."""
        residual = np.abs(self.residual).max(initial=0.0)
        return f"Ledger(targets={len(self.target)}, leaks={list(self.leaks)}, residual={residual:.1e})"

    def __str__(self) -> str:
        """Format a table for each target: what each layer's operations kept of the target, and the residual."""
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
