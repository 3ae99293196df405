"""The documentation builds without a warning, shows every public name, and leaves no markup of docstrings raw.

The pages are made from the sources, which are read and not imported; one build serves all tests.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = sorted(page.stem for page in (ROOT / "docs/api").glob("*.md") if (ROOT / "moejax" / page.stem).is_dir())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def exported(room: str) -> Iterator[str]:
    """The names in ``__all__`` of a room, read from its source; files that it exports are left out."""
    body = ast.parse((ROOT / "moejax" / room / "__init__.py").read_text()).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == f"moejax.{room}"]
    files = {alias.name for node in imports for alias in node.names}
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            for name in ast.literal_eval(node.value):
                if name not in files:
                    yield name


def test_every_room_has_a_page() -> None:
    rooms = {path.parent.name for path in (ROOT / "moejax").glob("*/__init__.py")}
    assert rooms == {*ROOMS, "cli"}, "a page in docs/api and a line in mkdocs.yml for each room"


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_shown(site: Path, room: str) -> None:
    page = (site / "api" / room / "index.html").read_text()
    shown = {identifier.rpartition(".")[2] for identifier in re.findall(rf'id="moejax\.{room}\.([\w.]+)"', page)}
    assert not set(exported(room)) - shown


def test_docstrings_leave_no_markup() -> None:
    """Checked on the sources: a role that is not closed would be shown as it is."""
    opened = re.compile(r":(func|class|meth|attr|data|mod):(?!`~?[\w.]+`)")
    raw = [path for path in (ROOT / "moejax").rglob("*.py") if opened.search(path.read_text())]
    assert not raw


def test_roles_become_links(site: Path) -> None:
    for page in (site / "api").rglob("index.html"):
        assert not re.search(r":(func|class|meth|attr|data|mod):(<code>|`)", page.read_text()), page
    links = re.findall(r'<a class="autorefs[^>]*href="([^"]*)"><code>', (site / "api/rules/index.html").read_text())
    assert links
    assert all("#moejax." in link for link in links)


def test_files_outside_of_docs_are_pages(site: Path) -> None:
    contributing = (site / "contributing/index.html").read_text()
    assert 'href="../howto/rule/"' in contributing
    for page in ("changelog", "results"):
        assert (site / page / "index.html").is_file()
