"""Targets from text, for the command line."""

import json
import re
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from moejax.errors import PromptError
from moejax.relevance.targets.base import TARGETS, Target

_NAME = re.compile(r"\s*(\w+)=")
_WORD = re.compile(r"\S+")


def parse_target(text: str) -> Target:
    """Make a target of its name and fields, as in ``router_choice layer=3 expert=1 versus=2``.

    Values are JSON: ``token=" Paris"``, ``other=[" London", 5]``, ``attention=true``. A value that is no JSON is text
    up to the next space: ``token=Paris``.

    Raises:
        PromptError: an unknown target, an unknown or missing field, or a value that does not fit.
    """
    name, _, rest = text.strip().partition(" ")
    kind = TARGETS.find(name)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values = _values(name, rest, known)
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in values]
    if missing:
        raise PromptError(f"target {name!r} needs {', '.join(missing)}; {_usage(name, known)}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        if hints[key] in (int, bool) and type(value) is not hints[key]:
            raise PromptError(f"{key}={json.dumps(value)} is not of type {hints[key].__name__}; {_usage(name, known)}")
    return kind(**values)


def target_help() -> dict[str, str]:
    """Return the name of every target with the first line of its docstring."""
    return {name: (kind.__doc__ or "").strip().split("\n")[0] for name, kind in TARGETS.items()}


def _values(name: str, text: str, known: dict[str, Field]) -> dict[str, Any]:
    """Read ``field=value`` pairs."""
    values, place = {}, 0
    while text[place:].strip():
        match = _NAME.match(text, place)
        if match is None or match[1] not in known:
            word = text[place:].split()[0]
            raise PromptError(f"target {name!r} does not understand {word!r}; {_usage(name, known)}")
        try:
            values[match[1]], place = json.JSONDecoder().raw_decode(text, match.end())
            is_json = place == len(text) or text[place].isspace()
        except json.JSONDecodeError:
            is_json = False
        if not is_json:
            word = _WORD.match(text, match.end())
            if word is None or word[0][0] in '"[{':
                raise PromptError(f"the value of {match[1]!r} is no JSON; {_usage(name, known)}")
            values[match[1]], place = word[0], word.end()
    return values


def _usage(name: str, known: dict[str, Field]) -> str:
    """List the fields of a target, with the defaults of those that need not be given."""
    words = [f.name if f.default is MISSING else f"{f.name}={json.dumps(f.default)}" for f in known.values()]
    return f"its fields are {', '.join(words)}, written as in {name} {words[0].partition('=')[0]}=.."
