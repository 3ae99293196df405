"""DLBacktrace's interface over ``explain``: generate, explain every step, evaluate, draw."""

from moejax.dlbacktrace.api import Backtrace

__all__ = ["Backtrace"]
