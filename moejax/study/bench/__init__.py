"""Time a model on this machine, and compare with the least time that the machine could take."""

from moejax.study.bench.cases import CASES, Case
from moejax.study.bench.run import BenchRow, bench, heading
from moejax.study.bench.shapes import SHAPES, published, random_decoder

__all__ = ["CASES", "SHAPES", "BenchRow", "Case", "bench", "heading", "published", "random_decoder"]
