"""A bench as a table, printed line by line as cases complete."""

from moejax.report.schema import BenchEntry, BenchHeading

_COLUMNS = (
    ("case", 35),
    ("T", 6),
    ("ms", 10),
    ("floor ms", 10),
    ("ratio", 7),
    ("queued ms", 10),
    ("call ms", 9),
    ("targets/s", 10),
    ("compile s", 10),
    ("cached s", 9),
    ("peak GB", 8),
)
"""Names and widths of the columns."""


def heading_lines(heading: BenchHeading) -> list[str]:
    """Lines with the model, device, versions and limits, and with the names of the columns."""
    versions = ", ".join(f"{name} {version}" for name, version in heading["versions"].items())
    return [
        f"{heading['model']}: {heading['weights_gb']:.2f} GB of weights in {heading['dtype']}, on {heading['device']}",
        f"{versions}; a large copy moves {heading['tb_per_s']:.3g} TB/s, a large product runs at "
        f"{heading['tflop_per_s']:.3g} TFLOP/s",
        _line([name for name, _ in _COLUMNS]),
    ]


def row_line(row: BenchEntry) -> str:
    """One line of the table, from the dictionary of :meth:`moejax.study.bench.BenchRow.to_dict`."""
    if row["failed"] is not None:
        return _line([row["case"], str(row["tokens"]), row["failed"]])
    rate = f"{row['targets_per_s']:.1f}" if row["targets_per_s"] else "-"
    times = [f"{value:.2f}" for value in (row["ms"], row["floor_ms"], row["ratio"])]
    times += [f"{value:.2f}" if value else "-" for value in (row["queued_ms"], row["call_ms"])]
    seconds = [f"{value:.1f}" for value in (row["compile_s"], row["cached_s"])]
    line = _line([row["case"], str(row["tokens"]), *times, rate, *seconds, f"{row['peak_gb']:.2f}"])
    return line if row["load"] is None else f"{line}   most loaded expert: {row['load']:.2f}x the mean"


def _line(cells: list[str]) -> str:
    """The cells in their columns: the first aligned to the left, the others to the right."""
    first, *rest = zip(cells, _COLUMNS, strict=False)
    return first[0].ljust(first[1][1]) + "".join(cell.rjust(max(width, len(cell) + 1)) for cell, (_, width) in rest)
