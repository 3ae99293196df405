"""Text that others wrote, shown so that it cannot act: tokens, labels, names and paths.

An escape sequence in a tokenizer's vocabulary could rewrite the terminal that shows it, a mark that turns the direction
of text could make a line read as another, and an invisible character could hide a part of a name. Such characters stand
as signs or as their code points. Brackets stay what they are: rich's markup is never read in such text.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.table import Table
from rich.text import Text

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍"}

# control and format characters, halves of surrogate pairs, separators of lines and paragraphs
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")

# without these, words of some languages and some emoji fall apart
_JOINERS = "\u200c\u200d"

# letters and marks without ink
_INVISIBLE = {
    *"\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0",
    *map(chr, range(0x180B, 0x1810)),
    *map(chr, range(0xE0000, 0xE1000)),
}


def escaped(text: str, keep: str = "") -> str:
    """Return ``text`` with a visible sign or escape sequence for every character that would act or hide.

    Args:
        text: what is to be shown.
        keep: characters that stay as they are.
    """
    return "".join(c if c in keep else _shown(c) for c in text)


def visible(token: str) -> str:
    """Return a token's text as :func:`escaped` shows it; ``∅`` for an empty one."""
    return escaped(token) or "∅"


def printed(text: str) -> str:
    """Return a text of several lines as :func:`escaped` shows it, with its line breaks and tabs."""
    return escaped(text, keep="\n\t")


def cell(text: str, style: str = "") -> Text:
    """Return a text for a table or a console, in which no markup is read."""
    return Text(escaped(text), style)


class PlainTable(Table):
    """A table of texts that others wrote: titles, headers and cells are shown as they are.

    Args:
        headers: the names of the columns.
        title, caption: what stands above and below.
        options: further arguments of the table.
    """

    def __init__(self, *headers: str, title: str = "", caption: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.title = cell(title, "table.title") if title else None
        self.caption = cell(caption, "table.caption") if caption else None
        for header in headers:
            self.add_column(cell(header))

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(cell(content) if isinstance(content, str) else content for content in cells), **options)


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character in _JOINERS:
        return character
    if unicodedata.category(character) in _UNSAFE or character in _INVISIBLE:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character
