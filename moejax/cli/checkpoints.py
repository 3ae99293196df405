"""``moejax convert``, ``export``, ``verify`` and ``doctor``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moejax.cli.options import AsJson, Plugin, add, shows_bar, use_host_only

Source = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or bundled name.")]
AnySource = Annotated[str, typer.Argument(help="Hugging Face folder, converted folder, hub id, or bundled name.")]
Destination = Annotated[Path, typer.Argument(help="Folder to make; it appears when it is complete.")]


def add_commands(app: typer.Typer) -> None:
    """Register the subcommands of this file."""
    add(app, convert, export, verify, doctor)


def convert(
    source: Source,
    destination: Destination,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64; by default the source's.")
    ] = None,
    allow_nonfinite: Annotated[bool, typer.Option(help="Accept weights that are NaN or infinite.")] = False,
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Write a Hugging Face model as a folder of Orbax checkpoints; a run that was stopped is continued."""
    import moejax

    use_host_only()
    bar = shows_bar(as_json)
    done = moejax.convert(source, destination, dtype=dtype, allow_nonfinite=allow_nonfinite, progress=bar)
    print(json.dumps(done.to_dict()) if as_json else done)


def export(
    source: AnySource,
    destination: Destination,
    max_shard_bytes: Annotated[int, typer.Option(help="Most bytes of a file.")] = 5_000_000_000,
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Write a model as Hugging Face files."""
    import moejax

    use_host_only()
    done = moejax.export(source, destination, max_shard_bytes=max_shard_bytes, progress=shows_bar(as_json))
    print(json.dumps(done.to_dict()) if as_json else done)


def verify(
    source: AnySource,
    dtype: Annotated[
        str, typer.Option(help="Dtype in which both compute; only float32 and float64 can tell.")
    ] = "float32",
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Compare logits with transformers' logits; exit code 1 if they differ."""
    from moejax.checkpoints.verify import verify as compare
    from moejax.report.checkpoints import verification_table

    result = compare(source, dtype=dtype)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        Console().print(verification_table(result.to_dict()))
    if result.passed is False:
        raise typer.Exit(1)


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder or bundled name; only its config is read.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights; by default float32 and bfloat16 are shown.")
    ] = None,
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Show versions and devices, and how much memory a model would take."""
    from moejax.checkpoints.doctor import examine
    from moejax.report.checkpoints import doctor_tables

    facts = examine(model, dtype=dtype)
    if as_json:
        print(json.dumps(facts))
    else:
        Console().print(*doctor_tables(facts))
