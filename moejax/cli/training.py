"""``moejax train``."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moejax.cli.options import AsJson, Plugin, add, check_folder
from moejax.cli.output import say, say_json


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
    log_every: Annotated[int | None, typer.Option(min=1, help="Steps between two rows of metrics instead.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between two saved states instead.")] = None,
    logger: Annotated[
        str | None, typer.Option(help="Log there too, if it is installed: wandb (Weights & Biases).")
    ] = None,
    fall_back: Annotated[
        bool, typer.Option(help="Set damaged states aside and go on from the newest that is whole.")
    ] = True,
    plugin: Plugin = None,
    as_json: AsJson = False,
) -> None:
    """Train a small decoder on text; writes metrics, checkpoints, and a model that every other command takes.

    Ctrl-C saves the state; the same command goes on from it.
    """
    from moejax.checkpoints.folder import BUNDLED
    from moejax.training import Run, TrainConfig

    changes = {"data": data, "steps": steps, "log_every": log_every, "save_every": save_every, "logger": logger}
    settings = TrainConfig.read(config or BUNDLED / "sample.json", **changes)
    if data is not None:
        settings = replace(settings, heldout=None)
    check_folder(out)
    run = Run(settings if moe_name is None else settings.with_moe(moe_name), out, falls_back=fall_back)
    if run.is_done:
        print(f"already done: {run.saved_step} steps; --steps of more goes on.", file=sys.stderr)
    else:
        run.check()
        _follow(run, settings.steps, as_json)
    if not as_json:
        say(f"the trained model: {out / 'model'}")


def _follow(run: Any, steps: int, as_json: bool) -> None:
    """Train and show the metrics. The first Ctrl-C ends the run after the steps that are on their way.

    Raises:
        Exit: it was stopped.
    """
    from moejax.report.training import follow

    def stop(*_: Any) -> None:
        run.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # a print could meet another that is on its way
        os.write(2, b"\nstopping after the steps that are on their way; Ctrl-C again stops at once\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        if as_json:
            for row in run:
                say_json(row)
        else:
            follow(run, steps)
        ended = f"stopped at step {run.saved_step}, saved" if run.stopped else ""
    except KeyboardInterrupt:
        ended = f"stopped; step {run.saved_step} is saved"
    finally:
        signal.signal(signal.SIGINT, before)
    if ended:
        print(f"{ended}; run the same command to go on", file=sys.stderr)
        raise typer.Exit(130)
