"""Figures in files."""

from pathlib import Path
from typing import Any

from moejax.writing import replacing


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure in the format that the suffix names, PNG without one; a file that is there is replaced.

    Args:
        options: what matplotlib's ``savefig`` takes.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no such format.
    """
    with replacing(path if path.suffix else path.with_name(f"{path.name}.png")) as temporary:
        figure.savefig(temporary, **options)
