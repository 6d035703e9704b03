"""A report as one text (for a terminal, Markdown, LaTeX), and as one JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from errata.report import contents, layout
from errata.report.folders import Folder
from errata.report.sections import Section
from errata.report.tables import JUDGED, PROTOCOLS


def notes(folders: Sequence[Folder]) -> dict[str, object]:
    """What made the numbers, of each run."""
    out: dict[str, object] = {}
    for folder in folders:
        found, name = folder.manifest, folder.path.resolve().name
        versions = found.get("versions") or {}
        said = [f"{k} {v}" for k, v in versions.items()]
        said += [f"commit {found['commit']}"] if found.get("commit") else []
        said += [f"threads {found['threads']}"] if found.get("threads") else []
        said += [f"config {found['config_hash']}"] if found.get("config_hash") else []
        out |= {f"{name}": ", ".join(said)} if said else {}
        out |= {f"{name}: {cell}": why for cell, why in folder.missing.items()}
    return out


def about(section: Section, number: int, several: bool) -> list[tuple[str, object]]:
    apart = [("apart from", "; and from ".join(section.apart))] if section.apart else []
    return [*([("section", f"{number}. {section.title}")] if several else []), *section.facts.items(), *apart]


ROWS: Final = ("rows", "retention", "right_after", "forgetting", "differences", "micro", "health", "undone", "costs", "settings", "apart")


def document(title: str, sections: Sequence[Section], folders: Sequence[Folder]) -> dict[str, Any]:
    """All that is known, but for the records."""
    told = [{"title": s.title, **s.facts, **{part: getattr(s, part) for part in ROWS}} for s in sections]
    missing = {f"{folder.path}: {cell}": why for folder in folders for cell, why in folder.missing.items()}
    gates = [found for folder in folders for found in folder.gates]
    return {"title": title, "sections": told, "missing": missing, "manifests": {str(f.path): f.manifest for f in folders}, "gates": gates}


def terminal(title: str, sections: Sequence[Section], notes: Mapping[str, object], more: Sequence[layout.Table] = ()) -> str:
    out = [title, *(f"{k}: {layout.plain(v)}" for k, v in notes.items())]
    for i, section in enumerate(sections, 1):
        out += ["", *(f"{k}: {layout.plain(v)}" for k, v in about(section, i, len(sections) > 1))]
        out += ["", layout.terminal(fitted(contents.tables(section))).rstrip("\n")]
    out += ["", layout.terminal(more).rstrip("\n")] if more else []
    return "\n".join(out) + "\n"


def fitted(tables: Iterable[layout.Table]) -> list[layout.Table]:
    """Few methods are compared on many metrics, and a terminal is narrow: such a table has its metrics down."""

    def down(table: layout.Table) -> bool:
        scored = table.key in PROTOCOLS or table.key.startswith(JUDGED)
        return scored and table.words == 1 and 2 <= len(table.lines) < len(table.headings)

    return [table.turned if down(table) else table for table in tables]


def markdown(title: str, sections: Sequence[Section], notes: Mapping[str, object], more: Sequence[layout.Table] = ()) -> str:
    out = [f"# {layout.cell(title)}", "", *(f"- {layout.cell(k)}: {layout.cell(v)}" for k, v in notes.items())]
    for i, section in enumerate(sections, 1):
        out += ["", *([f"## {i}. {layout.cell(section.title)}", ""] if len(sections) > 1 else [])]
        out += [f"- {layout.cell(k)}: {layout.cell(v)}" for k, v in about(section, i, False)]
        out += ["", layout.markdown(contents.tables(section)).rstrip("\n")]
    out += ["", layout.markdown(more).rstrip("\n")] if more else []
    return "\n".join(out) + "\n"


def latex(title: str, sections: Sequence[Section], notes: Mapping[str, object], more: Sequence[layout.Table] = ()) -> str:
    out = [f"% {layout.plain(title)}", r"% needs \usepackage{booktabs} and \usepackage[T1]{fontenc}"]
    out += [f"% {layout.plain(k)}: {layout.plain(v)}" for k, v in notes.items()]
    for i, section in enumerate(sections, 1):
        out += ["", *(f"% {layout.plain(k)}: {layout.plain(v)}" for k, v in about(section, i, len(sections) > 1)), ""]
        out.append(layout.latex(contents.tables(section)).rstrip("\n"))
    out += ["", layout.latex(more).rstrip("\n")] if more else []
    return "\n".join(out) + "\n"
