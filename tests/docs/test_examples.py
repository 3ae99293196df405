"""The code of the documentation runs: the files of the how-to pages, and the examples in the text."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs/howto/code").glob("*.py"))
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_of_a_guide_runs(path: Path) -> None:
    """As a user runs it: in a process of its own, where nothing is registered before."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_guide_has_its_file() -> None:
    pages = {page.stem for page in (ROOT / "docs/howto").glob("*.md")} - {"index"}
    assert pages == {path.stem for path in FILES}
    for page in pages:
        assert f'--8<-- "docs/howto/code/{page}.py"' in (ROOT / f"docs/howto/{page}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_in_the_text_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem
)
def test_files_that_a_page_names_exist(path: Path) -> None:
    """Paths in code, such as ``moejax/rules/gates.py``; patterns and folders to come are left out."""
    named = re.findall(r"`((?:moejax|scripts|tests|docs)/[\w/.]+\.(?:py|md|sh))`", path.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
