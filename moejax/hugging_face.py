"""transformers, imported only when a model's files need it, and without its notice that there is no PyTorch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from moejax.errors import CheckpointError

_NO_NOTICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextmanager
def _without_notice() -> Iterator[None]:
    before = os.environ.get(_NO_NOTICE)
    os.environ[_NO_NOTICE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_NOTICE]
        else:
            os.environ[_NO_NOTICE] = before


def import_transformers() -> Any:
    """Return the module ``transformers``; the first call takes a second or two."""
    with _without_notice():
        import transformers
    return transformers


@cache
def declared_fields(model_type: str) -> dict[str, Any] | None:
    """Return the fields that transformers' config class of a model type declares, with their defaults.

    A field has every name that the class accepts for it.

    Returns:
        From names to defaults; ``None`` if transformers does not know the model type.
    """
    with _without_notice():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    try:
        kind = CONFIG_MAPPING[model_type]
    except KeyError:
        return None
    config = kind()
    names = {*config.to_dict(), *config.attribute_map, *config.attribute_map.values()}
    return {name: getattr(config, name, None) for name in names}


def auto_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that transformers reads from a folder, whatever its files; no code of the folder is run.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    with _without_notice():
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes it raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: transformers cannot read its tokenizer: {reason[0]}") from error
