"""What `score` and `demo` have in common: scores on the screen, and a folder with records, summary and report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import errata
from errata.commands import files
from errata.commands.screen import Screen, as_json, json_lines
from errata.errors import InputError, UnknownNameError
from errata.report import contents, documents, tables
from errata.report.folders import RIGHT_AFTER
from errata.report.sections import Read, Section, of

Record = Mapping[str, Any]
Row = Mapping[str, Any]
LEAST = 10  # cases behind a difference that is pointed out: resampling a handful says nothing


class Watched:
    """Progress of one method, passed on with its name; ``seconds``: from the start until its last edit had ended."""

    def __init__(self, progress: Callable[[str, int, int], None], name: str) -> None:
        self.progress, self.name = progress, name
        self.began, self.seconds = time.perf_counter(), 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "editing" and done == total:
            self.seconds = time.perf_counter() - self.began
        self.progress(f"{self.name}: {stage}", done, total)


def differences(records: Sequence[Record], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every later method minus the first, for each metric and protocol that both have."""
    names = tables.methods(rows)
    return paired(of(records), rows, [(name, names[0]) for name in names[1:]])


def paired(said: Mapping[str, Read], rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The first of each pair minus the second, paired by case.  ``said``: how to read the records of a method."""
    from errata.score.metrics import difference

    has, out = {(r["method"], r["metric"], r["protocol"]) for r in rows}, []
    held: dict[str, list[Record]] = {}
    for name, minus in sorted(pairs, key=lambda pair: pair[1]):
        held = {n: held[n] if n in held else list(said[n]()) for n in (name, minus)}  # two methods in memory, not all
        for row in rows:
            if row["method"] == minus and (name, row["metric"], row["protocol"]) in has:
                # What cannot be compared is left out: no common case (sampled text), or a protocol that this errata does not know.
                with contextlib.suppress(InputError, UnknownNameError):
                    found = difference(held[name], held[minus], row["metric"], row["protocol"])
                    out.append({"method": name, "minus": minus, "metric": row["metric"], "protocol": row["protocol"], **found})
    order = {pair: i for i, pair in enumerate(pairs)}
    return sorted(out, key=lambda g: order[g["method"], g["minus"]])


def show(screen: Screen, rows: Sequence[Row], gaps: Sequence[Row]) -> None:
    """A table for each protocol, metrics down and methods across: few methods are compared on many metrics, and a terminal is narrow.

    Robustness has tables of its own behind them; of its many differences only those of the headline protocol are pointed out.
    """
    for part, before in ((tables.main(rows), ""), (tables.robust(rows), "Robustness. ")):
        for protocol in tables.protocols(part):
            screen.say(before + tables.title(protocol))
            screen.table(*tables.turned(part, protocol), right=(-1,))
            screen.say(
                f"{tables.unit(protocol)}, 95 % intervals over cases. {tables.counts(part, protocol)}.{tables.averages(part, protocol)}"
            )
            screen.say()
    first = tables.headline(gaps)
    gaps = [g for g in gaps if g["metric"] not in tables.ROBUST or g["protocol"] == first]
    enough = [g for g in gaps if g["n_cases"] >= LEAST]
    shown = [g for g in enough if contents.clear(g)]
    for protocol in tables.protocols(shown):
        mine = [g for g in shown if g["protocol"] == protocol]
        names = tables.merged(mine)
        for g in (g for g in mine if g["metric"] in names):
            where = f"{names[g['metric']]} ({protocol.replace('_', '-')})"
            screen.say(f"{g['method']} − {g['minus']}, {where}: {contents.gap(g)}")
    if enough:
        screen.say(f"No {'other ' if shown else ''}paired difference over at least {LEAST} cases is clear of 0 at 95 %.")


def micro(screen: Screen, averages: Sequence[Row]) -> None:
    """REP's averages: one line a method."""
    if averages:
        table = contents.micro(averages)
        screen.say(table.title)
        screen.table(table.headings, table.lines, right=(-1,))


def save(
    folder: Path, title: str, document: Mapping[str, Any], every: Sequence[Record], final: Sequence[Record], notes: Mapping[str, object]
) -> None:
    """records.jsonl (``every`` record), summary.json (``document``), report.html and report.md (``final``: one a probe and method)."""
    from errata.report.page import whole

    section = Section(
        "",
        rows=document["summary"],
        retention=document.get("retention", ()),
        right_after=document.get("right_after", ()),
        differences=document["differences"],
        micro=document.get("micro_averages", ()),
        records=of(final),
        right_after_records=of([r for r in every if r.get("edits") == RIGHT_AFTER]),
    )
    files.write(folder / "records.jsonl", json_lines(every))
    files.write(folder / "summary.json", as_json(document) + "\n")
    files.write(folder / "report.html", whole(title, [section], notes))
    files.write(folder / "report.md", documents.markdown(title, [section], notes))


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
