"""The trace of a run's explained steps: all relevance, sums of it, files, or nothing."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.dlbacktrace.nodes import EXPERT_SUFFIX
from moejax.dlbacktrace.propagation import StepRelevance
from moejax.errors import MoejaxError
from moejax.writing import replacing

POLICIES = ("full", "summary", "disk", "none")

TraceEntry = dict[str, Any]
"""One explained step, by the names that DLBacktrace uses."""


@dataclass(frozen=True)
class CachePolicy:
    """What a trace keeps of each step.

    Attributes:
        name: ``"full"`` keeps all arrays; ``"summary"`` keeps sums of nodes and experts; ``"disk"`` keeps these and
            the path of a file with all arrays; ``"none"`` keeps no step.
        folder: where ``"disk"`` writes; each run makes a new folder in it.

    Raises:
        MoejaxError: an unknown name.
    """

    name: str = "full"
    folder: Any = "./relevance_cache"

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise MoejaxError(f"relevance_cache_policy={self.name!r} is unknown; choose from {', '.join(POLICIES)}.")


class RelevanceTrace:
    """The entries of explained steps, kept by a :class:`CachePolicy`."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy, self.entries = policy.name, list[TraceEntry]()
        if self.policy == "disk":
            Path(policy.folder).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="run_", dir=policy.folder))

    def add(self, step: int, token: Any, relevance: StepRelevance) -> None:
        """Keep one step."""
        if self.policy == "none":
            return
        entry: TraceEntry = {"step_index": step, "token_id": token, "ledger": relevance.ledger}
        if self.policy == "full":
            entry |= {"all_wt": relevance.nodes, "expert_relevance": relevance.experts}
        else:
            entry["summary"] = summary(relevance)
        if self.policy == "disk":
            entry["path"] = str(self._folder / f"step_{step:05}.npz")
            with replacing(Path(entry["path"])) as temporary:
                np.savez_compressed(temporary, **relevance.nodes, **relevance.experts)  # type: ignore[arg-type]
        self.entries.append(entry)


def summary(relevance: StepRelevance) -> dict[str, np.ndarray]:
    """The sum of each node's relevance, a number for each row, and each expert's sum over the tokens."""
    nodes = {name: x.sum((1, 2), dtype=np.float64) for name, x in relevance.nodes.items()}
    return nodes | {key: x.sum(-2, dtype=np.float64) for key, x in relevance.experts.items()}


def load_step(path: Any) -> TraceEntry:
    """``all_wt`` and ``expert_relevance`` of a step that was written to a file.

    Raises:
        MoejaxError: the file is missing or was not written by a run.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise MoejaxError(f"{path}: not the relevance of a step: {error}") from error
    return {
        "all_wt": {k: x for k, x in arrays.items() if not k.endswith(EXPERT_SUFFIX)},
        "expert_relevance": {k: x for k, x in arrays.items() if k.endswith(EXPERT_SUFFIX)},
    }


def all_wt(entry: TraceEntry) -> dict[str, np.ndarray]:
    """An entry's relevance at every node, read from its file if it was written to one.

    Raises:
        MoejaxError: the entry holds sums only.
    """
    if "all_wt" in entry:
        return entry["all_wt"]
    if "path" in entry:
        return load_step(entry["path"])["all_wt"]
    raise MoejaxError("this trace holds sums only; run with relevance_cache_policy='full' or 'disk'.")
