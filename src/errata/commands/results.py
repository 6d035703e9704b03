"""What `score` and `demo` have in common: scores on the screen, and a folder with records, summary and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import errata
from errata.commands import files
from errata.commands.screen import Screen, as_json
from errata.report import tables

Record = Mapping[str, Any]
Row = Mapping[str, Any]
LEAST = 10  # cases behind a difference that is pointed out: resampling a handful says nothing


def differences(records: Sequence[Record], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every later method minus the first, paired by case, for each metric and protocol that both have."""
    from errata.score.metrics import difference

    names = tables.methods(rows)
    by_method = {name: [r for r in records if r["method"] == name] for name in names}
    has = {(r["method"], r["metric"], r["protocol"]) for r in rows}
    out = []
    for name in names[1:]:
        for row in rows:
            if row["method"] == names[0] and (name, row["metric"], row["protocol"]) in has:
                found = difference(by_method[name], by_method[names[0]], row["metric"], row["protocol"])
                out.append({"method": name, "minus": names[0], "metric": row["metric"], "protocol": row["protocol"], **found})
    return out


def show(screen: Screen, rows: Sequence[Row], gaps: Sequence[Row]) -> None:
    """A table for each protocol, metrics down and methods across: few methods are compared on many metrics, and a terminal is narrow."""
    for protocol in tables.protocols(rows):
        screen.say(tables.PROTOCOLS.get(protocol, protocol))
        heads, *lines = list(zip(*_columns(rows, protocol), strict=True))
        screen.table(heads, lines, right=(-1,))
        screen.say(f"{tables.unit(protocol)}, 95 % intervals over cases. {tables.counts(rows, protocol)}.")
        screen.say()
    enough = [g for g in gaps if g["n_cases"] >= LEAST]
    shown = [g for g in enough if g["low"] > 0 or g["high"] < 0]
    for g in shown:
        where = f"{tables.HEADINGS.get(g['metric'], g['metric'])} ({g['protocol'].replace('_', '-')})"
        screen.say(f"{g['method']} − {g['minus']}, {where}: {gap(g)}")
    if enough:
        screen.say(f"No {'other ' if shown else ''}paired difference over at least {LEAST} cases is clear of 0 at 95 %.")


def gap(row: Row) -> str:
    """ "+12.5 [+4.2, +20.8]", in percent."""
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _columns(rows: Sequence[Row], protocol: str) -> list[list[str]]:
    headings, lines = tables.grid(rows, protocol)
    return [["metric", *headings[1:]], *lines]


def markdown(title: str, rows: Sequence[Row], notes: Mapping[str, object], gaps: Sequence[Row], retention: Sequence[Row] = ()) -> str:
    """The report for a README."""
    lines = [f"# {title}", "", *(f"- {k}: {' '.join(str(v).split())}" for k, v in notes.items()), "", tables.markdown(rows)]
    if gaps:
        lines += ["## Paired differences", "", "| methods | metric | protocol | difference [95 %] |", "|---|---|---|---:|"]
        lines += [f"| {g['method']} − {g['minus']} | {g['metric']} | {g['protocol']} | {gap(g)} |" for g in gaps]
        lines.append("")
    if retention:
        lines += ["## After T edits", "", "| method | T | metric | protocol | value [95 %] |", "|---|---:|---|---|---:|"]
        lines += [f"| {r['method']} | {r['T']} | {r['metric']} | {r['protocol']} | {tables.cell(r)} |" for r in retention]
        lines.append("")
    return "\n".join(lines)


def save(
    folder: Path, title: str, document: Mapping[str, Any], every: Sequence[Record], final: Sequence[Record], notes: Mapping[str, object]
) -> None:
    """records.jsonl (``every`` record), summary.json (``document``), report.html and report.md (``final``: one a probe and method)."""
    from errata.report.page import page

    rows = document["summary"]
    files.write(folder / "records.jsonl", "".join(as_json(r, indent=None) + "\n" for r in every))
    files.write(folder / "summary.json", as_json(document) + "\n")
    files.write(folder / "report.html", page(title, rows, final, notes))
    files.write(folder / "report.md", markdown(title, rows, notes, document["differences"], document.get("retention", ())))


def notes(
    lm: Any, benchmark: Any, split: str | None, cases: int, seed: int | None, mode: str, seconds: Mapping[str, float]
) -> dict[str, object]:
    """What a reader must know to repeat the numbers."""
    import torch

    where = f"{split} split" if split is not None else str(benchmark.data)
    order = "the file's order" if seed is None else f"seed {seed}"
    dtype = str(lm.dtype).removeprefix("torch.")
    return {
        "model": f"{lm.name} ({type(lm.hf).__name__}, fingerprint {lm.fingerprint}, {dtype}, {lm.device.type})",
        "benchmark": f"{benchmark.name} version {benchmark.version}, {where}, {cases} cases, {order}",
        **({"records": "; ".join(benchmark.report.lines())} if hasattr(benchmark, "report") else {}),
        "mode": mode,
        **({"seconds an edit": ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())} if seconds else {}),
        "made with": f"errata {errata.__version__}, torch {torch.__version__.partition('+')[0]}",
    }
