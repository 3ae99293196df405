"""A training run as it goes: a progress bar, and a line of metrics now and then."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def follow(rows: Iterable[Mapping[str, Any]], steps: int, console: Console | None = None) -> None:
    """Show rows of metrics as they come; of the mixtures' numbers, their mean over the layers."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console()) as progress:
        task = progress.add_task("training", total=steps)
        for number, row in enumerate(rows):
            if number == 0 and (step := getattr(rows, "started_from", 0)):
                progress.console.print(f"resumed from step {step}")
            progress.update(task, completed=row["step"])
            progress.console.print(line(row), highlight=False, soft_wrap=True)


def line(row: Mapping[str, Any]) -> str:
    """One row as text."""
    shown = {"loss": row["cross_entropy"]}
    if "heldout" in row:
        shown["held-out"] = row["heldout"]
    for name, label in (
        ("balance_loss", "balance"),
        ("router_z_loss", "z"),
        ("load_entropy", "load entropy"),
        ("unused_experts", "unused"),
        ("dropped", "dropped"),
    ):
        if name in row:
            shown[label] = sum(row[name]) / len(row[name])
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    return f"{row['step']:>6}  {numbers}  {1e3 * row['seconds_per_step']:.0f} ms/step"
