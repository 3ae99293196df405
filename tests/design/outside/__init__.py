"""Files as a stranger writes them; :func:`registered` enters what they define for as long as a test needs it."""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moejax.layers import LAYERS
from moejax.models import FAMILIES
from moejax.relevance import BASELINES, TARGETS
from moejax.rules import RULES

FILES = sorted(Path(__file__).parent.glob("[a-z]*.py"))


@contextmanager
def registered() -> Iterator[None]:
    """Run the files; afterwards the tables are as before, since other tests compare what they hold."""
    with ExitStack() as stack:
        for table in (FAMILIES, RULES, TARGETS, BASELINES, LAYERS):
            stack.enter_context(table.restored())
        for path in FILES:
            # a module that was imported before does not register again by itself
            importlib.reload(importlib.import_module(f"{__name__}.{path.stem}"))
        yield
