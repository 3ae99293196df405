"""Options that several subcommands share, and help that lists what is registered."""

import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_REGISTRIES = {
    "RULES": ("moejax.rules", "RULES"),
    "TARGETS": ("moejax.relevance.targets", "TARGETS"),
    "BASELINES": ("moejax.relevance.baselines", "BASELINES"),
    "LAYERS": ("moejax.layers", "LAYERS"),
    "PLOTS": ("moejax.report.plots", "PLOTS"),
}
"""What stands in braces in a help text, and where the registry is whose names take its place."""


class RegistryHelp(TyperCommand):
    """A subcommand whose help names what is registered. The registries are imported only when help is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            for word, (module, name) in _REGISTRIES.items():
                if text and f"{{{word}}}" in text:
                    names = getattr(importlib.import_module(module), name)
                    text = text.replace(f"{{{word}}}", ", ".join(names))
            if text is not None:
                setattr(parameter, "help", text)  # noqa: B010 - click's parameters have it only if they are options
        super().format_help(ctx, formatter)


def run_plugins(paths: list[Path] | None) -> list[Path] | None:
    """Run Python files that register things, before anything else is looked at.

    Raises:
        OSError: a file cannot be read.
    """
    for path in paths or ():
        runpy.run_path(str(path))
    return paths


Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        callback=run_plugins,
        is_eager=True,
        help="Python file to run first, which registers a family, rule, layer, baseline, target or plot of your own; "
        "may be given several times.",
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Bundled name, Hugging Face folder, or hub id.")]
# JAX keeps 32 bits of a seed
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]


def shows_bar(as_json: bool) -> bool:
    """True if a progress bar may be shown: a person watches, and no program reads."""
    return not as_json and sys.stderr.isatty()


def use_host_only() -> None:
    """Keep to the CPU: files are rearranged, and an accelerator would be taken for nothing."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def check_file(path: Path) -> None:
    """Raise ``MoejaxError`` if a file cannot be written there."""
    from moejax import MoejaxError

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise MoejaxError(f"cannot write {path}: its folder does not exist, or it is a folder itself.")


def check_folder(path: Path) -> None:
    """Raise ``MoejaxError`` if files cannot be written there, before hours are spent on what they should hold."""
    from moejax import MoejaxError

    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise MoejaxError(f"cannot write into {path}: {nearest} is no folder, or not yours to write to.")


def add(app: Any, *commands: Any) -> None:
    """Register functions as subcommands under their own names."""
    for command in commands:
        app.command(cls=RegistryHelp)(command)
