"""Limits of the house, read from the sources without importing them: sizes, names, docstrings, direction of imports.

``KNOWN`` lists what stood against a limit when the test was written. An entry leaves the list with the change that
mends it, and a test fails until it does; nothing may be added.
"""

import ast
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moejax"

FILE_LINES = 400
FUNCTION_LINES = 60
KERNEL_LINES = 80
KERNELS = "moejax/ops/experts/"
"""Folder whose functions may have ``KERNEL_LINES``: bodies of GPU kernels are one sequence of steps."""

COMMON = {
    "_version",
    "errors",
    "compilation_cache",
    "hugging_face",
    "processes",
    "program",
    "registry",
    "writing",
    "xla",
}
"""Files that every room may import; they import each other alone."""

FLOORS: dict[str, float] = {
    "bundled": 0,
    "ops": 0,
    "report": 0,
    "routing": 1,
    "rules": 1,
    "layers": 2,
    "models": 3,
    "checkpoints": 4,
    "generation": 4,
    "prompts": 4.4,
    "lm": 4.5,
    "relevance": 5,
    "training": 5,
    "dlbacktrace": 6,
    "study": 6,
    "moejax": 6.5,  # the names of moejax/__init__.py
    "cli": 7,
    "__main__": 8,
}
"""The floor of every room (docs/rooms.md). A room imports from lower floors only, and not from its own."""

KNOWN: dict[str, set[str]] = {
    "long files": set(),
    "long functions": set(),
    "docstrings": set(),
    "class names": set(),
    "imports": set(),
}
"""By limit, what stands against it today."""


@cache
def trees() -> list[tuple[str, ast.Module]]:
    """Every source file of the package, as a path relative to the repository and its syntax tree."""
    return [(p.relative_to(ROOT).as_posix(), ast.parse(p.read_text())) for p in sorted(PACKAGE.rglob("*.py"))]


def long_files() -> set[str]:
    """Files of more than ``FILE_LINES`` lines."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(ROOT).as_posix() for p in paths if len(p.read_text().splitlines()) > FILE_LINES}


def long_functions() -> set[str]:
    """Functions of more lines than their folder allows, decorators not counted, nested functions included."""
    long = set()
    for path, tree in trees():
        limit = KERNEL_LINES if path.startswith(KERNELS) else FUNCTION_LINES
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > limit:
                    long.add(f"{path} {node.name}")
    return long


def headless_docstrings() -> set[str]:
    """Docstrings, also those below constants, that begin with "Of ": the reader must supply the noun."""
    headless = set()
    for path, tree in trees():
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if not isinstance(body, list):
                continue
            for before, statement in zip([node, *body], body, strict=False):
                if _text(statement).startswith("Of "):
                    headless.add(f"{path} {_name(before)}")
    return headless


def _text(statement: ast.stmt) -> str:
    """The string that a statement consists of; empty for any other statement."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _name(node: ast.AST) -> str:
    """The name that a docstring belongs to: a definition's, or that of the assignment above."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", node)
    return getattr(target, "name", getattr(target, "id", "module"))


def repeated_class_names() -> set[str]:
    """Names of classes that are defined in more than one place, each with its files."""
    places = defaultdict(list)
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    return {f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1}


def upward_imports() -> set[str]:
    """Imports, also those inside of functions and for type checkers, that do not go down a floor."""
    return {
        f"{path} -> {target}"
        for path, tree in trees()
        for target in imported_rooms(path, tree)
        if not _may_import(_room(path), target)
    }


def imported_rooms(path: str, tree: ast.Module) -> set[str]:
    """The rooms that a file imports from, other than its own; ``moejax`` for names of the package itself."""
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.removesuffix(".py").removesuffix("/__init__").split("/")
            is_package = path.endswith("/__init__.py")
            base = package[: len(package) - node.level + is_package] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top == "moejax":
                rooms.add(rest[0] if rest and rest[0] in FLOORS | dict.fromkeys(COMMON) else "moejax")
    return rooms - {_room(path)}


def _room(path: str) -> str:
    """The room of a file: the folder, or the file, right below the package."""
    name = path.split("/")[1].removesuffix(".py")
    return "moejax" if name == "__init__" else name


def _may_import(source: str, target: str) -> bool:
    if source in COMMON or target in COMMON:
        return target in COMMON
    return FLOORS[target] < FLOORS[source]


LIMITS: dict[str, Callable[[], set[str]]] = {
    "long files": long_files,
    "long functions": long_functions,
    "docstrings": headless_docstrings,
    "class names": repeated_class_names,
    "imports": upward_imports,
}

every_limit = pytest.mark.parametrize("limit", LIMITS)


def test_every_room_has_a_floor() -> None:
    rooms = {_room(path) for path, _ in trees()}
    assert rooms <= set(FLOORS) | COMMON, "give the new room a floor, here and in docs/rooms.md"


@every_limit
def test_nothing_new_stands_against_a_limit(limit: str) -> None:
    new = LIMITS[limit]() - KNOWN[limit]
    assert not new, f"{limit}, beyond the limits of CONTRIBUTING.md:\n" + "\n".join(sorted(new))


@every_limit
def test_what_is_mended_has_left_the_list(limit: str) -> None:
    mended = KNOWN[limit] - LIMITS[limit]()
    assert not mended, f"delete from KNOWN[{limit!r}]:\n" + "\n".join(sorted(mended))


def test_imports_are_found_wherever_they_stand() -> None:
    source = "def f():\n    from moejax import LM, report\n    from ..rules import Gates\n    import moejax.cli, jax\n"
    assert imported_rooms("moejax/layers/norm.py", ast.parse(source)) == {"moejax", "report", "rules", "cli"}
    assert imported_rooms("moejax/layers/__init__.py", ast.parse("from . import norm\nfrom .. import LM")) == {"moejax"}
    assert imported_rooms("moejax/lm.py", ast.parse("from .errors import MoejaxError")) == {"errors"}
