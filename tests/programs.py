"""Every compiled program keeps memory maps, of which a process may have 65,530; then the compiler aborts."""

from itertools import count
from pathlib import Path

import jax

_MAPS, _TESTS = Path("/proc/self/maps"), count()


def forget_if_many() -> None:
    """For after every test; maps are counted after every eighth, since that takes some milliseconds."""
    if next(_TESTS) % 8 == 0 and _MAPS.exists() and len(_MAPS.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
