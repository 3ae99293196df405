"""Options that several subcommands share, and help that lists what is registered."""

import importlib
import inspect
import os
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from moejax.cli.prompts import Prompts

_REGISTRIES = {
    "RULES": ("moejax.rules", "RULES"),
    "TARGETS": ("moejax.relevance.targets", "TARGETS"),
    "BASELINES": ("moejax.relevance.baselines", "BASELINES"),
    "LAYERS": ("moejax.layers", "LAYERS"),
    "PLOTS": ("moejax.report.plots", "PLOTS"),
}
"""What stands in braces in a help text, and where the registry is whose names take its place."""


_UNITS = {"": 1} | {
    f"{letter}{binary}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for binary in ("", "i")
}
"""Bytes of a unit, without the final b."""


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
        MoejaxError: there is no such file.
        OSError: a file cannot be read.
    """
    from moejax.errors import MoejaxError

    for path in paths or ():
        if not path.is_file():
            raise MoejaxError(f"--plugin {path}: no such file.")
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


def parse_size(text: str) -> int | str:
    """Return the bytes that a size stands for (``1500000000``, ``12GiB``, ``800MB``), or ``"auto"``.

    Raises:
        BadParameter: it stands for nothing of the kind.
    """
    if text.strip() == "auto":
        return "auto"
    parts = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        number, unit = parts.groups() if parts else ("", "")
        return int(float(number) * _UNITS[unit.lower().removesuffix("b")])
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(f"{text!r} is no size; write 12GiB, 800MB, a number of bytes, or auto.") from error


@dataclass(frozen=True)
class Loading:
    """How a subcommand loads its model. A parameter of this class stands for an option of each field (:func:`add`)."""

    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the weights: bfloat16, float16, float32 or float64; default: the checkpoint's."),
    ] = None
    keep_packed: Annotated[
        bool, typer.Option("--keep-packed", help="Keep experts that are published as MXFP4 in 4 bits.")
    ] = False
    experts: Annotated[
        str | None, typer.Option(help="int8: round the experts' weights to 8 bits, half of bfloat16's memory.")
    ] = None
    max_bytes: Annotated[
        Any,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Most memory to take beside the weights: 12GiB, 800MB, or auto, what is free (the default on GPUs).",
        ),
    ] = None

    def load(self, source: str) -> Any:
        """Load a model; if its experts are rounded, say on stderr by how much.

        Raises:
            MoejaxError: there is no such model, or it cannot be held so.
        """
        import moejax
        from moejax.checkpoints.convert import parse_dtype

        dtype = None if self.dtype is None else parse_dtype(self.dtype)
        lm = moejax.load(source, dtype=dtype, keep_packed=self.keep_packed, experts=self.experts)
        if lm.quantisation is not None:
            print(lm.quantisation, file=sys.stderr)
        return lm

    def check_forward(self, config: Any, batch: int, tokens: int, itemsize: int) -> None:
        """Raise ``MoejaxError`` if a forward pass over ``batch`` sequences of ``tokens`` takes more than is allowed."""
        from moejax import MoejaxError
        from moejax.study.fit import forward_bytes

        if not isinstance(self.max_bytes, int):
            return
        if (need := forward_bytes(config, batch, tokens, itemsize)) > self.max_bytes:
            raise MoejaxError(
                f"--max-bytes={self.max_bytes} is too little: {batch} x {tokens} tokens take about {need} bytes beside "
                "the weights; take fewer tokens at a time."
            )


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
        app.command(cls=RegistryHelp)(with_groups(command))


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return the subcommand with an option for each field of a group in place of a parameter of the group's class."""
    signature = inspect.signature(command)
    parameters = signature.parameters.values()
    groups = {p.name: p.annotation for p in parameters if p.annotation in (Loading, Prompts)}
    kind = inspect.Parameter.KEYWORD_ONLY

    def options(group: Any) -> list[inspect.Parameter]:
        hints = get_type_hints(group, include_extras=True)
        return [inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name]) for f in fields(group)]

    shown = [options(groups[p.name]) if p.name in groups else [p.replace(kind=kind)] for p in parameters]

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options_of_all = [option for some in shown for option in some]
    # read by typer; the names of plain parameters and of options are its business
    run.__signature__ = signature.replace(parameters=options_of_all)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options_of_all}
    del run.__wrapped__  # type: ignore[attr-defined]
    return run
