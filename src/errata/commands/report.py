"""``errata report``: runs as tables, CSV and one page; what may stand in one table does, the rest is in sections of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata import storage
from errata.commands import common, results
from errata.commands.screen import Screen, write
from errata.errors import ConfigError, StorageError, UnknownNameError
from errata.report import contents, csv_export, documents, gate_maps
from errata.report.folders import Folder, read
from errata.report.layout import Table
from errata.report.sections import Section, gather
from errata.report.tables import methods, protocols

_FORMATS = {"terminal": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "html": "html"}
FEW = 5  # methods of which every pair is compared
_ENDINGS = {**{f".{ending}": name for name, ending in _FORMATS.items()}, ".htm": "html"}


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "report", run, "tables, CSV and a page of runs", model=False)
    out.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of `errata run`, cells of one, `errata score --out` or `demo --out`"
    )
    out.add_argument("--format", metavar="NAME[,NAME]", help=f"{', '.join(_FORMATS)} or all (terminal; with --out, by its ending)")
    out.add_argument("--out", type=Path, metavar="PATH", help="a file for one format; a folder for several (report.md, report.tex …)")
    out.add_argument("--force", action="store_true", help="replace what is there")
    out.add_argument("--title", help="of the page")
    out.add_argument(
        "--against", metavar="METHOD", help="what differences are taken from; all: every pair (all of up to 5 methods, else the first)"
    )
    out.add_argument("--protocol", metavar="NAME[,NAME]", help="only these: starts, teacher_forced …")
    out.add_argument("--cases", type=common.positive, metavar="N", help="of each section in the page (all)")


def formats(args: argparse.Namespace) -> list[str]:
    """What to write, in the usual order; checked against --out."""
    ending = args.out.suffix.lower() if args.out is not None else ""
    if args.format is None:
        return ["terminal"] if args.out is None else [_ENDINGS[ending]] if ending in _ENDINGS else list(_FORMATS)
    if args.json and args.out is None:
        raise ConfigError("--json prints a document of its own; leave out --format, or give --out")
    asked = common.listed(args.format)
    asked = list(_FORMATS) if asked == ["all"] else asked
    if odd := [name for name in asked if name not in _FORMATS] or (not asked and [args.format]):
        raise UnknownNameError(f"no format {odd[0]!r}; there are {', '.join(_FORMATS)} and all")
    if args.out is None and len(asked) > 1:
        raise ConfigError("several formats do not go to one screen; give --out a folder")
    if len(asked) > 1 and ending in _ENDINGS:
        raise ConfigError(f"--out {args.out} is one file and {len(asked)} formats were asked for; give a folder")
    return [name for name in _FORMATS if name in asked]


def run(args: argparse.Namespace, screen: Screen) -> None:
    wanted, folders = formats(args), [read(path) for path in args.runs]
    targets = _targets(args, wanted)
    sections = gather(folders)
    if not sections and not any(folder.gates for folder in folders):
        raise ConfigError(f"{args.runs[0]}: no cell is complete; run `errata run` again to go on with it")
    _only(sections, args.protocol)
    _differences(sections, args.against)
    title = args.title or f"errata report: {', '.join(dict.fromkeys(Path(f.path).resolve().name for f in folders))}"
    for name in wanted:
        if args.out is None and name == "terminal":
            screen.document(documents.document(title, sections, folders))
            _show(screen, title, sections, folders)
            continue
        text = _written(name, title, sections, folders, args.cases)
        if args.out is None:
            write(sys.stdout, text)
        else:
            storage.write_atomic(targets[name], text.encode("utf-8", "replace"))
    if args.out is not None:
        screen.document({**documents.document(title, sections, folders), "saved": {k: str(v) for k, v in targets.items()}})
        _tell(screen, sections, folders)
        screen.say(common.saved(args.out))


def _targets(args: argparse.Namespace, wanted: Sequence[str]) -> dict[str, Path]:
    """Where each format goes; `StorageError` before any work where that is taken or cannot be."""
    if args.out is None:
        return {}
    single = len(wanted) == 1 and not args.out.is_dir() and (args.out.suffix or args.format is not None)
    out = {name: args.out if single else args.out / f"report.{_FORMATS[name]}" for name in wanted}
    if taken := [path for path in out.values() if path.exists() and not (args.force and path.is_file())]:
        raise StorageError(f"{taken[0]} exists already; give another name, or --force to replace it")
    folder = args.out.parent if single else args.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({error.strerror}); choose another place") from None
    return out


def _only(sections: Sequence[Section], names: str | None) -> None:
    """Rows of other protocols are left out."""
    if names is None:
        return
    asked = common.listed(names)
    there = protocols([row for section in sections for row in section.rows])
    if odd := [name for name in asked if name not in there]:
        raise UnknownNameError(f"--protocol {odd[0]!r}: these runs have {', '.join(there)}")
    for section in sections:
        for part in ("rows", "retention", "right_after", "forgetting"):
            setattr(section, part, [row for row in getattr(section, part) if row["protocol"] in asked])


def _differences(sections: Sequence[Section], against: str | None) -> None:
    """Paired by case, from the records; a section without them has none."""
    known = [name for section in sections for name in methods(section.rows)]
    every = against == "all" and "all" not in known
    if against not in (None, "all", *known):
        raise UnknownNameError(f"--against {against!r}: these runs have {', '.join(dict.fromkeys(known))}, and all")
    for section in sections:
        names = [name for name in methods(section.rows) if name in section.records]
        if every or (against is None and len(names) <= FEW):
            pairs = [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
        else:
            first = against if against in names else names[0] if names else ""
            pairs = [(a, first) for a in names if a != first]
        section.differences = results.paired(section.records, section.rows, pairs)


def _written(name: str, title: str, sections: Sequence[Section], folders: Sequence[Folder], cases: int | None) -> str:
    if name == "csv":
        return csv_export.write(sections)
    if name == "html":
        from errata.report.page import whole

        manifests = {str(f.path): f.manifest for f in folders if f.manifest}
        return whole(title, sections, documents.notes(folders), manifests, _gated(folders), cases)
    write_one = {"terminal": documents.terminal, "markdown": documents.markdown, "latex": documents.latex}[name]
    return write_one(title, sections, documents.notes(folders), _gates(folders))


def _show(screen: Screen, title: str, sections: Sequence[Section], folders: Sequence[Folder]) -> None:
    """On the screen, wrapped to its width."""
    screen.say(title)
    for k, v in documents.notes(folders).items():
        screen.say(f"{k}: {v}")
    for i, section in enumerate(sections, 1):
        screen.say()
        for k, v in documents.about(section, i, len(sections) > 1):
            screen.say(f"{k}: {v}")
        for table in documents.fitted(contents.tables(section)):
            _table(screen, table)
    for table in _gates(folders):
        _table(screen, table)


def _table(screen: Screen, table: Table) -> None:
    screen.say(f"\n{table.title}")
    screen.table(table.headings, table.lines, right=range(table.words, len(table.headings)))
    screen.say(table.note)


def _gated(folders: Sequence[Folder]) -> list[Mapping[str, Any]]:
    """All documents of `errata analyse gates`."""
    return [document for folder in folders for document in folder.gates]


def _gates(folders: Sequence[Folder]) -> list[Table]:
    """Their tables, each named after what was looked at."""
    return [replace(t, title=f"{t.title} ({gate_maps.name(d)})") for d in _gated(folders) for t in gate_maps.tables(d)]


def _tell(screen: Screen, sections: Sequence[Section], folders: Sequence[Folder]) -> None:
    """What was left out, and what stands apart."""
    for folder in folders:
        for cell, why in folder.missing.items():
            screen.say(f"Left out: {folder.path}: {cell}: {why}.")
    for section in sections:
        if section.apart:
            screen.say(f"{section.title}: apart from {'; and from '.join(section.apart)}.")
