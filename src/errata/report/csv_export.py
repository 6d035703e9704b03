"""The scores of a report as one CSV file, a line a number: to be read by programs, so values are shares as they were measured.

After all edits, right after each, after T edits, forgetting by age, REP's averages, differences of two methods, seconds by kind of work.
"""

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
        yield from ({**about, "what": "REP's average", "metric": r["score"], **_known(r), "n_probes": r["n"]} for r in section.micro)
        yield from ({**about, "what": _age(r), "metric": "retained", **_known(r), "n_cases": r["held"]} for r in section.forgetting)
        yield from ({**about, "what": f"seconds of {kind}", **value} for kind, value in _seconds(section))


def _known(row: Row) -> dict[str, object]:
    values = {k: row.get(k) for k in COLUMNS if k in row}
    return {**values, "value": row["retained"]} if "retained" in row else values


def _age(row: Row) -> str:
    ages = f"{row['age_low']}" if row["age_low"] == row["age_high"] else f"{row['age_low']} to {row['age_high']}"
    return f"of edits that held right after, with {ages} edits after them"


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
