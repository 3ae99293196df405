"""The table that ``moejax doctor --gpu`` prints."""

from typing import NotRequired, TypedDict

from rich.table import Table

from moejax.report.visible import PlainTable, cell


class FitEntry(TypedDict):
    """Some work with a model on a GPU.

    ``bytes`` is the estimate, ``weights`` included; ``options`` are those of the command line, ``experts`` is the
    format in which experts are held, empty for the dtype. An explanation also says how many targets it propagates at a
    time (``chunk``), and how many layers it computes again.
    """

    work: str
    fits: bool
    bytes: int
    weights: int
    options: str
    dtype: str
    experts: str
    chunk: NotRequired[int]
    rematerialised_layers: NotRequired[int]


class FitReport(TypedDict):
    """What fits a GPU: its memory, the part of it that JAX can use, and an entry for each kind of work."""

    gpu: str
    name: str
    bytes: int
    usable: int
    model: str
    work: list[FitEntry]
    emulates_bfloat16: bool


def fit_table(report: FitReport) -> Table:
    """A table of the dictionary that :func:`moejax.study.fit.fit` returns."""
    caption = "estimates, from the config alone"
    if report["emulates_bfloat16"]:
        caption += "; this GPU has no units for bfloat16 and computes it slowly"
    title = f"{report['model']} on {report['name']}: JAX can use {_gib(report['usable'])} GiB"
    table = PlainTable("work", "fits", "GiB", "with", title=title, caption=caption)
    for entry in report["work"]:
        fits = cell("yes", "green") if entry["fits"] else cell("no", "red")
        table.add_row(entry["work"], fits, _gib(entry["bytes"]), _options(entry))
    return table


def _options(entry: FitEntry) -> str:
    """The options, and how an explanation saves memory."""
    again, chunk = entry.get("rematerialised_layers", 0), entry.get("chunk")
    saved = [entry["options"]]
    if chunk is not None:
        saved += [f"{chunk} target{'s' * (chunk > 1)} at a time"]
    if again:
        saved += [f"{again} layer{'s' * (again > 1)} computed again"]
    return ", ".join(saved)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
