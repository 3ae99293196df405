"""What the project says of itself agrees with its files."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def written_version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "moejax/_version.py").read_text(), flags=re.MULTILINE)
    assert match is not None
    return match[1]


def test_the_version_stands_in_one_place() -> None:
    import moejax

    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "moejax/_version.py"
    assert moejax.__version__ == written_version()


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {written_version()}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{written_version()}]" in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_packed_exists() -> None:
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists(), name
    assert (ROOT / "moejax/py.typed").is_file()


def test_patent_notice_stays() -> None:
    """Where it stood, at the end of the README, and with the other limits."""
    notice = (
        "The authors of LXT state that LRP is patented and free only for personal and scientific use; "
        "ask before you sell it."
    )
    for page in ("README.md", "docs/limits.md"):
        assert notice in " ".join((ROOT / page).read_text().split()), page
