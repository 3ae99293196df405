"""A result in a file: one safetensors file, with a versioned JSON header in its metadata.

Arrays are tensors; names, texts and candidates are in the header. Nothing is pickled, and every number comes back bit
for bit: JSON writes the shortest decimal number that reads back as the same float.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from moejax.errors import MoejaxError
from moejax.relevance.experts import ExpertRelevance
from moejax.relevance.ledger import Ledger
from moejax.relevance.result import Candidate, Relevance
from moejax.writing import write_file

FORMAT = "moejax.Relevance"
"""The key of the header in the file's metadata."""

VERSION = 1
"""The version of the format that this package writes; it reads all up to it."""

_SHAPES = {
    "token_ids": "T",
    "positions": "N",
    "layers": "N M T",
    "heads": "N L T H",
    "shared": "N L T 1",
    "slots": "N L T K",
    "ids": "L T K",
    "weights": "L T K",
    "target": "N",
    "tokens": "N",
    "leaks": "N M",
    "vectors": "N T ...",
    "edges": "N * T T",
}
"""Shape of each tensor, by the last word of its name, or the first of leaks and vectors.

M stands for L + 1, a star for any size, and dots for any further axes.
"""

_ARRAYS = ("token_ids", "positions", "layers", "heads")
"""Fields of a result that are tensors under their own names."""

_TEXTS: dict[str, Any] = {
    "model": str,
    "rule": str,
    "prompt": str,
    "prompt_length": int,
    "pieces": [str],
    "labels": [str],
    "roles": [str],
}
"""Fields of a result that are in the header, with their types; a list stands for a list of such."""

_PARTS = ("feed_forward", "attention")
"""Mixtures that a result may have."""

_FIELDS = ("slots", "ids", "weights")
"""Fields of a mixture that are tensors."""

_NUMBERS = {"count": int, "of_tokens": bool}
"""Fields of a mixture that are in the header."""


def save(rel: Relevance, path: str | Path) -> None:
    """Write a result into a file; a file that is there is replaced. One process of several writes.

    Raises:
        MoejaxError: the file cannot be written.
    """
    mixtures = {name: part for name in _PARTS if (part := getattr(rel, name)) is not None}
    tensors = {name: getattr(rel, name) for name in _ARRAYS}
    tensors |= {} if rel.shared is None else {"shared": rel.shared}
    tensors |= {f"{name}.{field}": getattr(part, field) for name, part in mixtures.items() for field in _FIELDS}
    tensors |= {"ledger.target": rel.ledger.target, "ledger.tokens": rel.ledger.tokens}
    tensors |= {f"leaks/{name}": leak for name, leak in rel.ledger.leaks.items()}
    tensors |= {f"vectors/{node}": vector for node, vector in rel.vectors.items()}
    header = {"version": VERSION, **{name: getattr(rel, name) for name in _TEXTS}}
    header["candidates"] = [[list(candidate) for candidate in row] for row in rel.candidates]
    header["mixtures"] = {name: {f: getattr(part, f) for f in _NUMBERS} for name, part in mixtures.items()}
    # the file sorts its tensors, but tables show leaks in the order of the result
    header["leaks"], header["vectors"] = list(rel.ledger.leaks), list(rel.vectors)
    if jax.process_index():
        return
    path = Path(path).expanduser()
    try:
        write_file(
            path, to_bytes({n: np.ascontiguousarray(t) for n, t in tensors.items()}, {FORMAT: json.dumps(header)})
        )
    except (OSError, SafetensorError) as error:
        raise MoejaxError(f"{path}: the result cannot be written: {error}") from error


def load(path: str | Path) -> Relevance:
    """Read a result from a file that :func:`save` wrote.

    Raises:
        MoejaxError: the file is missing, damaged, no saved result, or of a newer version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MoejaxError(f"{path}: no such file; Relevance.save writes one.")
    try:
        with safe_open(path, framework="numpy") as file:
            names, metadata = file.keys(), file.metadata() or {}
            # a model's file may be large: it is refused before its tensors are read
            tensors = {name: file.get_tensor(name) for name in names} if FORMAT in metadata else {}
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise MoejaxError(f"{path}: damaged, or not a file of Relevance.save: {error}") from error
    if FORMAT not in metadata:
        raise MoejaxError(f"{path}: holds no result of explain; models are read by moejax.load.")
    try:
        return _result(_header(metadata[FORMAT]), tensors)
    except _DamagedError as error:
        raise MoejaxError(f"{path}: {error}") from error


class _DamagedError(Exception):
    """What is wrong with a file, without its name."""


def _header(text: str) -> dict[str, Any]:
    """Parse and check the header."""
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _DamagedError("damaged: its header is no JSON object with a version.") from error
    if type(version) is not int or version > VERSION:
        raise _DamagedError(f"has version {version!r}, but this moejax reads up to {VERSION}: pip install -U moejax")
    kinds = _TEXTS | {"candidates": list, "mixtures": dict, "leaks": [str], "vectors": [str]}
    wrong = [name for name, kind in kinds.items() if not _is(header.get(name), kind)]
    try:
        header["candidates"] = [[_candidate(*entry) for entry in row] for row in header.get("candidates", ())]
        numbers = {
            name: {f: kind(part[f]) for f, kind in _NUMBERS.items()} for name, part in header["mixtures"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        wrong = wrong or ["candidates or mixtures"]
    else:
        header["mixtures"] = numbers
    if wrong or not header["mixtures"].keys() <= set(_PARTS):
        raise _DamagedError(f"damaged: its header has no right {', '.join(wrong or ['mixtures'])}.")
    return header


def _candidate(token: str, id: int, logit: float, probability: float) -> Candidate:
    return Candidate(str(token), int(id), float(logit), float(probability))


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value has a type; a list of a type stands for a list of such values."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(item) is kind[0] for item in value)
    return type(value) is kind


def _result(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Relevance:
    """Make the result of a header and tensors that fit together."""
    mixtures, texts = header["mixtures"], {name: header[name] for name in _TEXTS}
    wanted = [*_ARRAYS, "ledger.target", "ledger.tokens"]
    wanted += [f"{name}.{field}" for name in mixtures for field in _FIELDS]
    wanted += [f"{group}/{name}" for group in ("leaks", "vectors") for name in header[group]]
    if differing := sorted({*wanted} ^ (tensors.keys() - {"shared"})):
        raise _DamagedError(f"damaged: tensors are missing, or belong to nothing: {', '.join(differing[:5])}.")
    sizes = {"T": len(texts["pieces"]), "N": len(texts["labels"]), "1": 1}
    for name, tensor in tensors.items():
        _check(name, tensor, sizes)
    indices = {"positions": (0, sizes["T"])} | {f"{name}.ids": (-1, part["count"]) for name, part in mixtures.items()}
    outside = [name for name, (low, high) in indices.items() if not _within(tensors[name], low, high)]
    if outside or sizes["M"] != sizes["L"] + 1 or not 0 < texts["prompt_length"] <= sizes["T"]:
        raise _DamagedError(f"damaged: {', '.join(outside) or 'layers or prompt_length'} out of range.")

    def experts(name: str) -> ExpertRelevance | None:
        return (
            ExpertRelevance(**{f: tensors[f"{name}.{f}"] for f in _FIELDS}, **mixtures[name])
            if name in mixtures
            else None
        )

    fields: dict[str, Any] = texts | {name: tensors[name] for name in _ARRAYS}
    return Relevance(
        **fields,
        shared=tensors.get("shared"),
        feed_forward=experts("feed_forward"),
        attention=experts("attention"),
        vectors={node: tensors[f"vectors/{node}"] for node in header["vectors"]},
        ledger=Ledger(
            tensors["ledger.target"],
            tensors["ledger.tokens"],
            {name: tensors[f"leaks/{name}"] for name in header["leaks"]},
        ),
        candidates=header["candidates"],
    )


def _within(indices: np.ndarray, low: int, high: int) -> bool:
    return not indices.size or bool(indices.min() >= low and indices.max() < high)


def _check(name: str, tensor: np.ndarray, sizes: dict[str, int]) -> None:
    """Check a tensor's kind and shape; letters that are new enter ``sizes``."""
    prefix, _, field = name.partition("/")
    key = prefix if field else name.rpartition(".")[2]
    key = "edges" if name.startswith("vectors/edges.") else key
    letters = _SHAPES[key].split()
    shape = tensor.shape[: len(letters) - 1] if letters[-1] == "..." else tensor.shape
    # the mixtures of both kinds may have different numbers of slots
    letters = [name.partition(".")[0] if axis == "K" else axis for axis in letters if axis != "..."]
    fits = len(shape) == len(letters) and all(
        a == "*" or sizes.setdefault(a, size) == size for a, size in zip(letters, shape, strict=True)
    )
    kind = "iu" if key in ("token_ids", "positions", "ids") else "fV"
    if not fits or tensor.dtype.kind not in kind:
        raise _DamagedError(
            f"damaged: {name} has shape {tensor.shape} and dtype {tensor.dtype}, which do not fit the rest."
        )
