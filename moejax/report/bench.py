"""A bench as lines of a table, each complete when its case is."""

from typing import Any

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


def heading_lines(heading: dict[str, Any]) -> list[str]:
    """Model, device, versions and limits; then the names of the columns."""
    versions = ", ".join(f"{name} {version}" for name, version in heading["versions"].items())
    return [
        f"{heading['model']}: {heading['weights_gb']:.2f} GB of weights in {heading['dtype']}, on {heading['device']}",
        f"{versions}; a large copy moves {heading['tb_per_s']:.3g} TB/s, a large product runs at "
        f"{heading['tflop_per_s']:.3g} TFLOP/s",
        _line([name for name, _ in _COLUMNS]),
    ]


def row_line(row: dict[str, Any]) -> str:
    """A row of :class:`moejax.study.bench.Row` as a dictionary."""
    if row["failed"] is not None:
        return _line([row["case"], str(row["tokens"]), row["failed"]])
    rate = f"{row['targets_per_s']:.1f}" if row["targets_per_s"] else "-"
    figures = [f"{row[name]:.2f}" for name in ("ms", "floor_ms", "ratio")]
    figures += [f"{row[name]:.2f}" if row[name] else "-" for name in ("queued_ms", "call_ms")]
    rest = [f"{row[name]:.1f}" for name in ("compile_s", "cached_s")]
    line = _line([row["case"], str(row["tokens"]), *figures, rate, *rest, f"{row['peak_gb']:.2f}"])
    return line if row["load"] is None else f"{line}   most loaded expert: {row['load']:.2f}x the mean"


def _line(cells: list[str]) -> str:
    first, *rest = zip(cells, _COLUMNS, strict=False)
    return first[0].ljust(first[1][1]) + "".join(cell.rjust(max(width, len(cell) + 1)) for cell, (_, width) in rest)
