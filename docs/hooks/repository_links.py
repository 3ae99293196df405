"""Pages from files outside of docs/, and links that work both in the repository and on the built pages.

A page links to other files by their place in the repository, as a reader of the repository needs it. Where the target
is a page, the link leads there; where it is a file that has no page, its path stands as code.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "scripts/RESULTS.md": "results.md",
}
"""Files of the repository that are pages too, and where these stand."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of a folder where the navigation says ``FOLDER/*``; a folder that is not there is left out."""
    config.nav = _expanded(config.nav or [], Path(config.docs_dir))
    return config


def _expanded(entries: list[Any], docs: Path) -> list[Any]:
    expanded = []
    for entry in entries:
        if not isinstance(entry, dict):
            expanded.append(entry)
            continue
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = _expanded(target, docs)
        elif target.endswith("/*"):
            target = sorted(p.relative_to(docs).as_posix() for p in docs.glob(f"{target}.md"))
        if target:
            expanded.append({title: target})
    return expanded


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside of docs/."""
    root = Path(config.docs_dir).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages, or show their paths as code."""
    here = page.file.src_uri
    sources = {made: source for source, made in PAGES.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))
    root = Path(config.docs_dir).parent

    def relink(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        made = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if made is not None and files.get_file_from_path(made) is not None:
            return f"[{text}]({posixpath.relpath(made, posixpath.dirname(here) or '.')}{anchor})"
        if not (root / path).exists():
            return match[0]  # mkdocs reports it
        return text if text.startswith("`") else f"{text} (`{path}`)"

    return _LINK.sub(relink, markdown)
