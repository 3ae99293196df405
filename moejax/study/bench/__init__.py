"""Time a model on this machine, beside what the machine could do."""

from moejax.study.bench.cases import CASES, Case
from moejax.study.bench.run import Row, bench, heading
from moejax.study.bench.shapes import SHAPES, published, random_decoder

__all__ = ["CASES", "SHAPES", "Case", "Row", "bench", "heading", "published", "random_decoder"]
