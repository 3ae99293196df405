"""Questions asked of a model over data: routing statistics, two checkpoints compared, the best experts masked."""

from moejax.study.analysis import Analysis, analyse
from moejax.study.compare import LayerChange, compare
from moejax.study.data import Batch, Documents, Windows
from moejax.study.drop_top import Probe, drop_top
from moejax.study.result import LayerStatistics, RoutingStatistics
from moejax.study.similarity import Similarity, similarities

__all__ = [
    "Analysis",
    "Batch",
    "Documents",
    "LayerChange",
    "LayerStatistics",
    "Probe",
    "RoutingStatistics",
    "Similarity",
    "Windows",
    "analyse",
    "compare",
    "drop_top",
    "similarities",
]
