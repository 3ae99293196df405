"""Texts and their labels from files: lines of JSON under any usual name, Parquet, or one plain text."""

import json
from pathlib import Path
from typing import Any

from moejax.checkpoints.folder import BUNDLED
from moejax.errors import MoejaxError

_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson", ".jl")
"""Suffixes, in small letters, of files with one JSON object a line."""

Texts = tuple[list[str], list[str | None]]
"""Texts, and the label of each, ``None`` for a text without one."""


def find_text(source: str | Path) -> Path:
    """Return the path of a text file.

    ``"sample"`` names the text that is bundled with moejax, unless a file of that name exists.
    """
    path, bundled = Path(source).expanduser(), BUNDLED / f"{source}.jsonl"
    return bundled if not path.exists() and bundled.is_file() else path


def read_texts(path: Path) -> Texts:
    """Read the texts of a file and their labels.

    Lines of JSON (``.jsonl``, ``.ndjson``, ``.jsonlines``, ``.jl``, in any case) hold an object a line with the string
    ``text`` and, optionally, ``label``; ``.json`` holds such lines, one object, or a list of objects; ``.parquet`` has
    columns of these names. Any other file is UTF-8 text and one document. A byte-order mark is skipped.

    Raises:
        MoejaxError: the file is missing, is not UTF-8, has a line that is not such an object, or is lines of JSON under
            another name; or Parquet is asked for and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        return _parquet(path)
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise MoejaxError(f"{path}: no such file; give a .npz corpus, a .jsonl, a text, or 'sample'.") from error
    except UnicodeDecodeError as error:
        raise MoejaxError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    if suffix in _LINES:
        return _lines(path, text)
    if suffix == ".json":
        return _json(path, text)
    if _is_lines(text):
        raise MoejaxError(f"{path}: lines of JSON, each a document of its own; name the file .jsonl.")
    return [text], [None]


def _is_lines(text: str) -> bool:
    """Return whether every line of a text is a JSON object with a text; two lines at least."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
        return False
    try:
        return all(isinstance(json.loads(line).get("text"), str) for line in lines[:10])
    except ValueError:
        return False


def _lines(path: Path, text: str) -> Texts:
    """The documents of lines of JSON; empty lines are skipped."""
    found = []
    # not splitlines(): JSON strings may contain other line separators, such as U+2028, but no newline
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                found.append(_document(where, json.loads(line)))
            except ValueError as error:
                if isinstance(error, MoejaxError):
                    raise
                raise MoejaxError(f"{where}: not JSON: {error}") from error
    return [text for text, _ in found], [label for _, label in found]


def _json(path: Path, text: str) -> Texts:
    """The documents of a JSON file: an object, a list of objects, or lines."""
    try:
        value = json.loads(text)
    except ValueError:
        return _lines(path, text)
    values = value if isinstance(value, list) else [value]
    found = [_document(f"{path}, document {number}", item) for number, item in enumerate(values, 1)]
    return [text for text, _ in found], [label for _, label in found]


def _parquet(path: Path) -> Texts:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MoejaxError(f"{path}: reading Parquet needs pyarrow: pip install 'moejax[parquet]'.") from error
    if not path.is_file():
        raise MoejaxError(f"{path}: no such file.")
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise MoejaxError(f"{path}: not a Parquet file: {error}") from error
    rows = table.select([name for name in ("text", "label") if name in table.column_names]).to_pylist()
    found = [_document(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
    return [text for text, _ in found], [label for _, label in found]


def _document(where: str, item: Any) -> tuple[str, str | None]:
    """Text and label of an object."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise MoejaxError(f'{where}: not an object with a string "text".')
    label = item.get("label")
    return item["text"], None if label is None else str(label)
