"""What the command prints of texts that others wrote: a model's answer, names and paths."""

import json
import sys
from typing import Any, TextIO


def say(*texts: Any, end: str = "\n", to: TextIO | None = None) -> None:
    """Print texts, one after the other, at once; a character that a terminal would obey stands as a visible sign.

    Pipes get the same: what is written into one reaches a terminal sooner or later. Data for programs, in which every
    character is kept, is what ``--json`` prints.

    Args:
        texts: what to print.
        end: what follows them.
        to: where to; by default standard output.
    """
    from moejax.report.visible import printed

    shown = "".join(printed(str(text)) for text in texts)
    print(shown, end=end, file=sys.stdout if to is None else to, flush=True)


def say_json(value: Any) -> None:
    """Print data as one line of JSON; a number that is not finite is null, which every program can read."""
    print(one_object(value), flush=True)


def one_object(value: Any) -> str:
    """Return data as one line of JSON, with null for a number that is not finite."""
    from moejax.report.numbers import finite

    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # rare, and looking at each number takes long
        return json.dumps(finite(value), allow_nan=False)
