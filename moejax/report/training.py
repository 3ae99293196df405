"""A training run in the terminal: a progress bar and lines of metrics."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moejax.report.schema import TrainingRow


def follow(rows: Iterable[Mapping[str, Any]], steps: int, console: Console | None = None) -> None:
    """Show a progress bar, and each row of metrics as a line when it arrives.

    Args:
        rows: rows as in :class:`moejax.report.schema.TrainingRow`. An attribute ``started_from``, if there is one, is
            the step at which the run resumed.
        steps: number of optimiser steps of the run.
        console: where to print; by default standard output.
    """
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console()) as progress:
        task = progress.add_task("training", total=steps)
        for number, row in enumerate(rows):
            if number == 0 and (step := getattr(rows, "started_from", 0)):
                progress.console.print(f"resumed from step {step}")
            progress.update(task, completed=row["step"])
            progress.console.print(line(cast(TrainingRow, row)), highlight=False, soft_wrap=True)


def line(row: TrainingRow) -> str:
    """A row of metrics as one line; metrics of mixture layers are averaged over the layers.

    The line has the step, the loss in nats a token, the loss on held-out data if it was measured, auxiliary losses, and
    the milliseconds of a step.
    """
    shown = {"loss": row["cross_entropy"]}
    if "heldout" in row:
        shown["held-out"] = row["heldout"]
    metrics: Mapping[str, Any] = row
    for name, label in (
        ("balance_loss", "balance"),
        ("router_z_loss", "z"),
        ("load_entropy", "load entropy"),
        ("unused_experts", "unused"),
        ("dropped", "dropped"),
    ):
        if name in metrics:
            shown[label] = sum(metrics[name]) / len(metrics[name])
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    return f"{row['step']:>6}  {numbers}  {1e3 * row['seconds_per_step']:.0f} ms/step"
