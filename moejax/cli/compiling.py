"""Who waits for a model's program to be compiled is told."""

import logging
import sys

_LOADED, _COMPILED = "jax._src.compiler", "jax._src.interpreters.pxla"
"""JAX's loggers that hear of a program that is not kept yet, and of every program."""


def tell_of_compiling() -> None:
    """Say on stderr, once, that a model's program is compiled, if a person looks on.

    JAX tells its loggers, before it compiles, that it has not found a program among those that are kept.
    """
    import jax

    from moejax.compilation_cache import FOLDER

    if not sys.stderr.isatty():
        return
    name = _LOADED if getattr(jax.config, FOLDER) else _COMPILED
    logger = logging.getLogger(name)
    logger.addHandler(_Teller(logging.DEBUG))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


class _Teller(logging.Handler):
    """Says once that something is compiled; other messages that are no details go to the root's handlers."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        from moejax.program import fast_tracing

        if record.levelno > logging.DEBUG:
            logging.getLogger().handle(record)
        # small programs are compiled on the way; those of a model are what takes time
        elif not self.said and fast_tracing.is_entered and _starts(record.msg):
            self.said = True
            print("compiling (once for this length) ..", file=sys.stderr, flush=True)


def _starts(message: str) -> bool:
    return message.startswith(("PERSISTENT COMPILATION CACHE MISS", "Compiling "))
