"""Questions about a model over a data set: routing statistics, comparing checkpoints, masking the best experts."""

from moejax.study.analysis import Analysis, analyse
from moejax.study.compare import LayerChange, compare
from moejax.study.data import Documents, WindowBatch, Windows
from moejax.study.drop_top import Probe, drop_top
from moejax.study.result import LayerStatistics, RoutingStatistics
from moejax.study.similarity import Similarity, similarities

__all__ = [
    "Analysis",
    "Documents",
    "LayerChange",
    "LayerStatistics",
    "Probe",
    "RoutingStatistics",
    "Similarity",
    "WindowBatch",
    "Windows",
    "analyse",
    "compare",
    "drop_top",
    "similarities",
]
