"""DLBacktrace's interface over ``explain``: generate, explain every step, evaluate, draw."""

from moejax.relevance.backtrace.api import Backtrace

__all__ = ["Backtrace"]
