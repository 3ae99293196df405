"""The prompts of ``moejax explain`` and ``moejax generate``: arguments, standard input, a file of texts, a chat."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Prompts:
    """What a subcommand is asked. A parameter of this class stands for an option of each field (``options.add``)."""

    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Texts; '-' reads one from standard input.", show_default=False),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(help="Also each text of a file: .jsonl, .json or .parquet, any other is one text; or 'sample'."),
    ] = None
    chat: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-",
            help="A chat instead: a JSON list of messages with role and content, or an object with 'messages'.",
        ),
    ] = None

    @property
    def are_several(self) -> bool:
        """Whether they were given in a way in which there may be more than one."""
        return self.data is not None or len(self.texts or ()) > 1

    def read(self) -> list[Any]:
        """Return the prompts: texts, or one :class:`moejax.Chat`.

        Raises:
            MoejaxError: there are none, both texts and a chat, or a file that cannot be read.
        """
        from moejax.errors import PromptError
        from moejax.training.texts import find_text, read_texts

        if self.chat is not None:
            if self.texts or self.data is not None:
                raise PromptError("--chat excludes other prompts: write what you ask as its last message.")
            return [read_chat(self.chat)]
        found = [_standard_input() if text == "-" else text for text in self.texts or ()]
        if self.data is not None:
            found += read_texts(find_text(self.data))[0]
        if not found:
            empty = "" if self.data is None else f"{self.data} has no texts; "
            raise PromptError(f"{empty}give a prompt, '-' to read it from standard input, --data FILE or --chat FILE.")
        return found


def read_chat(source: str) -> Any:
    """Return the :class:`moejax.Chat` that a file holds, or standard input where ``source`` is ``-``.

    An object's ``tools`` go to the chat template; its other fields are of no use here.

    Raises:
        MoejaxError: it is no JSON, or no chat.
        OSError: the file cannot be read.
    """
    from moejax import Chat
    from moejax.errors import PromptError
    from moejax.prompts import is_messages

    where = "standard input" if source == "-" else source
    try:
        text = _standard_input() if source == "-" else Path(source).expanduser().read_text("utf-8-sig")
        given = json.loads(text)
    except FileNotFoundError as error:
        raise PromptError(f"--chat {where}: no such file; '-' reads standard input.") from error
    except ValueError as error:  # among them bytes that are not UTF-8
        raise PromptError(f"--chat {where}: not JSON: {error}") from error
    asked: Any = given.get("messages") if isinstance(given, dict) else given
    tools = given.get("tools") if isinstance(given, dict) else None
    if not is_messages(asked):
        raise PromptError(f"--chat {where}: a chat is a list of messages, each an object with 'role' and 'content'.")
    return Chat(asked, options={"tools": tools} if tools else {})


def _standard_input() -> str:
    """All of standard input, without the newline that ends its last line."""
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")
