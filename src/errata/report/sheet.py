"""All numbers of a report as one CSV file, a line a number: to be read by programs, so values are shares as they were measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from errata.report.layout import plain
from errata.report.sections import Section

Row = Mapping[str, Any]
COLUMNS: Final = (
    *("section", "model", "fingerprint", "benchmark", "scenario", "what", "method", "minus", "metric", "version", "protocol", "T"),
    *("value", "low", "high", "before", "n_cases", "n_probes"),
)
PARTS: Final = {
    "after all edits": "rows",
    "right after its own edit": "right_after",
    "after T edits": "retention",
    "difference": "differences",
}


def text(value: object) -> str:
    """A field of words: a spreadsheet takes one that begins with = + - @ for a formula, so an apostrophe stands before it."""
    said = plain(value)
    return f"'{said}" if said[:1] in tuple("=+-@") else said


def field(value: object) -> object:
    """Numbers as they are, nothing as nothing, words by `text`."""
    return "" if value is None else value if isinstance(value, int | float) else text(value)


def lines(sections: Sequence[Section]) -> Iterator[dict[str, object]]:
    """Each line of the file."""
    for number, section in enumerate(sections, 1):
        first = section.results[0] if section.results else None
        about = {"section": number, "scenario": section.facts.get("scenario"), "benchmark": section.facts.get("benchmark")}
        about |= {"model": first.model, "fingerprint": first.fingerprint} if first else {"model": section.facts.get("model")}
        for what, part in PARTS.items():
            for row in getattr(section, part):
                yield {**about, "what": what, **{k: row.get(k) for k in COLUMNS if k in row}}
        yield from ({**about, "what": f"seconds of {kind}", **value} for kind, value in _seconds(section))


def _seconds(section: Section) -> Iterable[tuple[str, dict[str, object]]]:
    for name, cost in section.costs.items():
        for kind, value in cost.get("seconds", {}).items():
            yield kind, {"method": name, "value": value}


def write(sections: Sequence[Section]) -> str:
    """The file, its heading first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines(sections):
        writer.writerow([field(line.get(column)) for column in COLUMNS])
    return out.getvalue()
