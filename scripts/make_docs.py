"""Write the pages of docs that are computed: one a method, the tables of choose.md and families.md, the picture and the
list of files of architecture.md.  ``make docs``.

python scripts/make_docs.py            # write them
python scripts/make_docs.py --check    # say which are stale, exit code 1 if any
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import docs_architecture
import docs_choice
import docs_families
import docs_methods
import docs_real

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.S)


def filled(text: str, parts: dict[str, str]) -> str:
    """A page with its computed parts put in anew."""
    return MADE.sub(lambda m: f"{m[1]}\n{parts[m[2]].strip()}\n\n{m[3]}", text)


def pages() -> dict[str, str]:
    """Path under docs -> what it should hold."""
    tables = {"choose.md": docs_choice.parts(), "families.md": docs_families.parts(), "architecture.md": docs_architecture.parts()}
    tables["results/real.md"] = docs_real.parts()
    tables["results/subject-gates.md"] = docs_real.gate_parts()
    made = {name: filled((DOCS / name).read_text(encoding="utf-8"), parts) for name, parts in tables.items()}
    return {**docs_methods.pages(), **made, docs_architecture.PICTURE: docs_architecture.picture()}


def stale() -> list[str]:
    """Pages that differ from what the code and the results say, and pages of methods that are gone."""
    wanted = pages()
    gone = [f"methods/{p.name}" for p in (DOCS / "methods").glob("*.md") if f"methods/{p.name}" not in wanted]
    return [name for name, text in wanted.items() if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text] + gone


def main() -> int:
    if "--check" in sys.argv[1:]:
        found = stale()
        print("\n".join(f"docs/{name} is stale; run `make docs`" for name in found))
        return 1 if found else 0
    (DOCS / "methods").mkdir(exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
