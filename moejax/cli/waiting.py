"""What the command does about compiling: programs are kept for the next run, and who waits for one is told."""

import hashlib
import logging
import os
import platform
import sys
from pathlib import Path

SETTING = "MOEJAX_COMPILATION_CACHE"
"""The environment variable that is ``off`` where compiled programs shall not be kept."""

_FOLDER = "jax_compilation_cache_dir"

_LARGEST = 2 << 30
"""Bytes of compiled programs that are kept; the programs that were not used for the longest time go first."""

_LOADED, _COMPILED = "jax._src.compiler", "jax._src.interpreters.pxla"
"""JAX's loggers that hear of a program that is not kept yet, and of every program."""


def cache_folder() -> Path | None:
    """Return where compiled programs are kept: JAX's own setting, else a folder of the user's; ``None`` for nowhere."""
    import jax

    if given := getattr(jax.config, _FOLDER):
        return Path(given)
    if os.environ.get(SETTING, "").lower() in ("off", "0", "no", "false"):
        return None
    # a home may be shared by machines, and programs for one CPU do not run on each other
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moejax" / "xla" / _machine()


def keep_programs() -> Path | None:
    """Have JAX keep compiled programs in :func:`cache_folder`, the small ones too; return the folder.

    Nothing is done where JAX was told another place, and where the folder cannot be written.
    """
    import jax

    try:
        folder = cache_folder()
        if folder is None or getattr(jax.config, _FOLDER):
            return folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
    except (OSError, RuntimeError):  # a user without a home
        return None
    jax.config.update(_FOLDER, str(folder))
    jax.config.update("jax_compilation_cache_max_size", _LARGEST)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder


def tell_of_compiling() -> None:
    """Say on stderr, once, that a model's program is compiled, if a person looks on.

    JAX tells its loggers, before it compiles, that it has not found a program among those that are kept.
    """
    import jax

    if not sys.stderr.isatty():
        return
    name = _LOADED if getattr(jax.config, _FOLDER) else _COMPILED
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


def _machine() -> str:
    """A name for machines with the same kind of CPU."""
    try:
        about = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
        flags = "".join(line for line in about.splitlines() if line.startswith(("flags", "Features", "model name")))
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
