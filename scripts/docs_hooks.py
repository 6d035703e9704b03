"""What MkDocs is told beside mkdocs.yml: pages that live outside docs/."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "src/errata/almanac/card.md": "almanac.md"}  # in the repository -> in the site


def on_files(files: Any, config: Any) -> Any:
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the repository as links of the site."""
    here = next((source for source, name in OUTSIDE.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    for source, name in OUTSIDE.items():
        theirs = posixpath.relpath(source, posixpath.dirname(here))
        markdown = markdown.replace(f"]({theirs}", f"]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')}")
    if here not in OUTSIDE:
        return markdown
    up = posixpath.relpath("docs", posixpath.dirname(here))
    return markdown.replace(f"]({up}/", "](")
