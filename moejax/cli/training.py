"""``moejax train``."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moejax.cli.options import AsJson, Plugin, add


def add_commands(app: typer.Typer) -> None:
    """Register the subcommands of this file."""
    add(app, train)


def train(
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the fields of moejax.training.TrainConfig; default: small, on bundled text."),
    ] = None,
    moe_name: Annotated[
        str | None, typer.Option(help="Registered MoE layer, with its default settings: {LAYERS}.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on.")] = Path("runs/train"),
    data: Annotated[str | None, typer.Option(help="Train on this .npz, .jsonl, text or 'sample' instead.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps instead.")] = None,
    plugin: Plugin = None,
    as_json: AsJson = False,
) -> None:
    """Train a small decoder on text; writes metrics, checkpoints, and a model that every other command takes."""
    from moejax.checkpoints.folder import BUNDLED
    from moejax.report.training import follow
    from moejax.training import Run, TrainConfig

    settings = TrainConfig.read(config or BUNDLED / "sample.json", data=data, steps=steps)
    if data is not None:
        settings = replace(settings, heldout=None)
    run = Run(settings if moe_name is None else settings.with_moe(moe_name), out)
    if as_json:
        for row in run:
            print(json.dumps(row), flush=True)
    else:
        follow(run, settings.steps)
        Console().print(f"the trained model: {out / 'model'}", highlight=False)
