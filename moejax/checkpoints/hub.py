"""Models on the Hugging Face hub: which of their files are downloaded, once, into the hub's cache."""

import contextlib
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from moejax.checkpoints.files import read_object
from moejax.errors import CheckpointError

SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*")
"""The patterns of config, tokenizer and notes. Never pickles, never code."""

_NOT = ("*/*",)
"""Files that are left out: those in folders, such as the ``original/`` weights beside a model's own."""


@dataclass(frozen=True)
class Hub:
    """Where and how a model is downloaded.

    Attributes:
        revision: branch, tag or commit; by default the main branch.
        token: access token; by default the one that ``hf auth login`` stored.
        cache_dir: folder of the cache; by default the hub's own.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None

    def download(self, name: str, only: Sequence[str] | None = None) -> Path:
        """Download what a model needs and the cache does not have yet; return its folder in the cache.

        Config and tokenizer come first; then the shards that the index names, or ``model.safetensors``.

        Args:
            name: the model's id.
            only: the patterns of the files, if not all are needed.

        Raises:
            CheckpointError: the hub has no such model or cannot be reached.
        """
        folder = self._snapshot(name, SIDE_FILES if only is None else only)
        if only is not None:
            return folder
        index = read_object(folder, "model.safetensors.index.json", CheckpointError) or {}
        shards = index.get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {"model.safetensors"}
        return self._snapshot(name, [glob.escape(str(shard)) for shard in sorted(names)])

    def _snapshot(self, name: str, patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}
        try:
            return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_NOT), **options))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{name!r} is neither a folder nor a bundled model, and the hub could not provide it: {reason}"
            ) from error


def download(name: str, files: Sequence[str] | None = None) -> Path:
    """Download a model with the hub's own defaults (:meth:`Hub.download`)."""
    return Hub().download(name, files)


def is_cached(name: str) -> bool:
    """Return whether the hub's cache has a model's config, and so most likely the model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


def is_reachable(seconds: float = 5.0) -> bool:
    """Return whether the hub answers within so many seconds.

    The question is asked in a thread of its own, since looking up a name has no time limit.
    """
    answers: list[bool] = []
    asking = Thread(target=lambda: answers.append(_answers(seconds)), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers == [True]


def _answers(seconds: float) -> bool:
    """Return whether the hub answers at all; an HTTP error is an answer."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # offline mode, and whatever the HTTP library raises without a network
        return False
    return True
