"""What is kept of each step's relevance: all of it, its sums, a file, or nothing."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from moejax.dlbacktrace.nodes import EXPERT_SUFFIX
from moejax.dlbacktrace.propagation import StepRelevance
from moejax.errors import MoejaxError

POLICIES = ("full", "summary", "disk", "none")

Entry = dict[str, Any]


def check(policy: str) -> str:
    """The policy.

    Raises:
        MoejaxError: there is none of that name.
    """
    if policy not in POLICIES:
        raise MoejaxError(f"relevance_cache_policy={policy!r} is unknown; choose from {', '.join(POLICIES)}.")
    return policy


class Trace:
    """Entries of explained steps, kept as ``policy`` says."""

    def __init__(self, policy: str, folder: Any) -> None:
        self.policy, self.entries = policy, list[Entry]()
        if policy == "disk":
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="run_", dir=folder))

    def add(self, step: int, token: Any, found: StepRelevance) -> None:
        """Keep one step."""
        if self.policy == "none":
            return
        entry: Entry = {"step_index": step, "token_id": token, "ledger": found.ledger}
        if self.policy == "full":
            entry |= {"all_wt": found.nodes, "expert_relevance": found.experts}
        else:
            entry["summary"] = summary(found)
        if self.policy == "disk":
            entry["path"] = str(self._folder / f"step_{step:05}.npz")
            np.savez_compressed(entry["path"], **found.nodes, **found.experts)  # type: ignore[arg-type]
        self.entries.append(entry)


def summary(found: StepRelevance) -> dict[str, np.ndarray]:
    """The sum of each node's relevance, a number for each row, and of each expert's over the tokens."""
    nodes = {name: x.sum((1, 2), dtype=np.float64) for name, x in found.nodes.items()}
    return nodes | {key: x.sum(-2, dtype=np.float64) for key, x in found.experts.items()}


def load_step(path: Any) -> Entry:
    """``all_wt`` and ``expert_relevance`` of a step that was kept on disk.

    Raises:
        MoejaxError: the file is missing or was not written by a run.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise MoejaxError(f"{path}: not the relevance of a step: {error}") from error
    return {
        "all_wt": {k: x for k, x in found.items() if not k.endswith(EXPERT_SUFFIX)},
        "expert_relevance": {k: x for k, x in found.items() if k.endswith(EXPERT_SUFFIX)},
    }


def all_wt(entry: Entry) -> dict[str, np.ndarray]:
    """An entry's relevance at every node, from its file if it is there.

    Raises:
        MoejaxError: only sums of it were kept.
    """
    if "all_wt" in entry:
        return entry["all_wt"]
    if "path" in entry:
        return load_step(entry["path"])["all_wt"]
    raise MoejaxError("this trace holds sums only; run with relevance_cache_policy='full' or 'disk'.")
