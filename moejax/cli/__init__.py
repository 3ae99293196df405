"""The ``moejax`` command: a thin layer over the library, a file for each group of subcommands."""

import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console

from moejax._version import __version__
from moejax.cli import checkpoints, explaining, studying, training
from moejax.cli.compiling import tell_of_compiling


def show_version(wanted: bool) -> bool:
    """Print the version and end, if it is wanted."""
    if wanted:
        print(f"moejax {__version__}")
        raise typer.Exit
    return wanted


_INTERRUPTED = 130
"""The exit code of what was ended by Ctrl-C, as shells have it."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # options may be written with underscores, as in LibMoE's --moe_name
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Load, explain and train Mixture-of-Experts language models in JAX."""


for group in (explaining, checkpoints, studying, training):
    group.add_commands(app)


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as one line; where it was raised in the code is of no use to those who run a command."""
    from moejax.errors import one_line

    print(f"moejax: note: {one_line(' '.join(str(message).split()))}", file=sys.stderr)


def _raise_broken_pipe(self: Console) -> None:
    # without a number: typer makes exit code 1 of an error that has one
    raise BrokenPipeError


def main() -> None:
    """Run the command as a process of its own.

    Where the user has stopped it, the process ends at once: what the devices compute goes on while Python takes itself
    apart, and has crashed when its program was taken away.
    """
    try:
        run()
    except SystemExit as end:
        if end.code != _INTERRUPTED:
            raise
        if _is_unsaid(end):
            print("moejax: stopped", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(_INTERRUPTED)


def _is_unsaid(end: SystemExit) -> bool:
    """Return whether typer made this of a Ctrl-C, of which no command said anything."""
    return isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt)


def run() -> None:
    """Run the command; an error that a person can mend is one line on stderr and exit code 1."""
    from moejax.compilation_cache import keep_programs
    from moejax.errors import MoejaxError, one_line
    from moejax.ops.memory import reserve_memory

    # by default JAX leaves a quarter of a GPU's memory to others, and a model of 61 GB no room on 80
    reserve_memory()
    keep_programs(small=True)
    tell_of_compiling()
    warnings.showwarning = show_warning
    Console.on_broken_pipe = _raise_broken_pipe  # rich ends with exit code 1
    output = sys.stdout
    try:
        try:
            app()
        except SystemExit:
            if sys.stdout is not output:  # typer covers it once a write has met a closed pipe
                raise BrokenPipeError from None
            raise
        finally:
            output.flush()
    except BrokenPipeError:
        # `moejax .. | head` has what it wants. What is left in the buffer goes nowhere, or Python complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        sys.exit(0)
    except (MoejaxError, OSError) as error:  # a full disk is nobody's bug either
        line = f"moejax: {one_line(str(error))}"  # names in files are anybody's
        Console(stderr=True, soft_wrap=True).print(line, style="red", markup=False, highlight=False)
        sys.exit(1)
