"""Compiled programs are kept on disk for the next run: JAX's persistent compilation cache, switched on by default."""

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

SETTING = "MOEJAX_COMPILATION_CACHE"
"""The environment variable that is ``off`` where compiled programs shall not be kept."""

FOLDER = "jax_compilation_cache_dir"
"""JAX's own setting of the folder."""

_LARGEST = 2 << 30
"""Bytes of compiled programs that are kept; the programs that were not used for the longest time go first."""


def cache_folder() -> Path | None:
    """Return where compiled programs are kept: JAX's own setting, else a folder of the user's; ``None`` for nowhere."""
    if given := getattr(jax.config, FOLDER):
        return Path(given)
    if os.environ.get(SETTING, "").lower() in ("off", "0", "no", "false"):
        return None
    # a home may be shared by machines, and programs for one CPU do not run on each other
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moejax" / "xla" / _machine()


def keep_programs(*, small: bool = False) -> Path | None:
    """Have JAX keep compiled programs in :func:`cache_folder`, from now on; return the folder.

    Nothing is done where JAX was told another place, and where the folder cannot be written.

    Args:
        small: keep programs that take less than a second to compile, too.
    """
    try:
        folder = cache_folder()
        if folder is None or getattr(jax.config, FOLDER):
            return folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
    except (OSError, RuntimeError):  # a user without a home
        return None
    jax.config.update(FOLDER, str(folder))
    jax.config.update("jax_compilation_cache_max_size", _LARGEST)
    if small:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX decides with its first program whether it keeps programs
    compilation_cache.reset_cache()
    return folder


def _machine() -> str:
    """A name for machines with the same kind of CPU."""
    try:
        about = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
        flags = "".join(line for line in about.splitlines() if line.startswith(("flags", "Features", "model name")))
    except OSError:
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
