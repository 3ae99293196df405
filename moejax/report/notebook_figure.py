"""A matplotlib figure that shows itself in a notebook. Imported only when a figure is drawn."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure without pyplot. It brings its own picture: notebooks show plain figures only once pyplot is loaded."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()
