"""DLBacktrace's interface, computed by ``moejax.relevance``: generate, explain every step, evaluate one step, draw.

Letters of shapes in this room, beside the common ones: ``T`` columns of token ids as the user gave them, padded on any
side, and generated columns behind them; ``W`` positions of the left-padded rows that the model reads; ``A`` new tokens
of a row.
"""

from moejax.dlbacktrace.api import Backtrace
from moejax.dlbacktrace.auto_sampler import DLBAutoSampler

__all__ = ["Backtrace", "DLBAutoSampler"]
