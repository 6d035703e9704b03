"""The tables of a section (`errata.report.sections`): scores, what T edits do, paired differences, time and memory, the guard.

One table holds one protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from errata.report.layout import Table
from errata.report.sections import Section
from errata.report.tables import cell, main, merged, methods, percent, protocols, scores, span, title

Row = Mapping[str, Any]
_MICRO: Final = "As REP averages: percent of all items of all records, every token of the answer right, the answer being fed"
SPENT: Final = ("loading", "asking the base", "preparing", "editing", "scoring", "checking", "sampling", "timing", "saving")
TIMES: Final = (
    "Percent, 95 % intervals over cases. T: all edits so far, on the model as it is after T edits; right after: each on the model as its "
    "own edit left it."
)
_AGES: Final = (
    "Of the edits that held right after they were made, percent that hold at the end, by the number of edits that came later; "
    "95 % intervals over edits."
)
_CLOCK: Final = (
    "Wall-clock seconds on the machine of the run. Loading the model and asking it unedited is done once for the methods that share it."
)
CLEAR: Final = "*"  # behind a difference whose interval leaves out 0


def tables(section: Section) -> list[Table]:
    """All of them, in reading order."""
    every = [*scores(section.rows), micro(section.micro), *differences(section.differences), *after(section.retention, section.right_after)]
    every += [*forgetting(section.forgetting), times(section.costs), memory(section.costs), health(section.health), undone(section.undone)]
    return [table for table in every if table.lines]


def micro(rows: Sequence[Row]) -> Table:
    """REP's averages, a line a method."""
    names = list(dict.fromkeys(str(row["score"]) for row in rows))
    at = {(row["method"], row["score"]): row for row in rows}
    lines = []
    for method in methods(rows):
        found = [at.get((method, name)) for name in names]
        lines.append([method, *("–" if row is None else f"{percent(row['value'])} of {row['n']}" for row in found)])
    return Table(_MICRO, ["method", *names], lines, key="micro")


def gap(row: Row) -> str:
    """ "+12.5 [+4.2, +20.8]", in percent."""
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def clear(row: Row) -> bool:
    """Whether the interval leaves out 0."""
    return bool(row["low"] > 0 or row["high"] < 0)


def differences(rows: Sequence[Row]) -> list[Table]:
    """A table a protocol: a line a pair of methods, a column a metric."""
    out = []
    for protocol in protocols(rows):
        mine = [row for row in rows if row["protocol"] == protocol]
        at = {(row["method"], row["minus"], row["metric"]): row for row in mine}
        columns, pairs = merged(mine), list(dict.fromkeys((row["method"], row["minus"]) for row in mine))
        lines = [[f"{a} − {b}", *(_gap(at.get((a, b, metric))) for metric in columns)] for a, b in pairs]
        counts = [int(row["n_cases"]) for row in mine]
        note = f"Points, 95 % intervals over {span(counts)} common cases, paired by case; {CLEAR} its interval leaves out 0."
        out.append(Table(f"Paired differences. {title(protocol)}", ["methods", *columns.values()], lines, note, key=protocol))
    return out


def _gap(row: Row | None) -> str:
    return "–" if row is None else gap(row) + (f" {CLEAR}" if clear(row) else "")


def after(retention: Sequence[Row], right_after: Sequence[Row]) -> list[Table]:
    """A table a protocol: a line a method and metric, columns right after its own edit, and after T edits."""
    out, rows, soon = [], main(retention), main(right_after)
    for protocol in protocols(rows):
        mine = [row for row in rows if row["protocol"] == protocol]
        found = {(row["method"], row["metric"], row["T"]): row for row in mine}
        then = [row for row in soon if row["protocol"] == protocol]
        first = {(row["method"], row["metric"]): row for row in then}
        at = sorted({row["T"] for row in mine})
        shown = {row["metric"] for row in mine}
        names = merged([*mine, *(row for row in then if row["metric"] in shown)])
        pairs = [(m, k) for k in names for m in methods(mine) if any((m, k, t) in found for t in at)]
        lines = [[names[k], m, cell(first.get((m, k))), *(cell(found.get((m, k, t))) for t in at)] for m, k in pairs]
        heads = ["metric", "method", "right after", *(f"T = {t}" for t in at)]
        out.append(Table(f"After T edits. {title(protocol)}", heads, lines, TIMES, 2, key=protocol))
    return out


def forgetting(rows: Sequence[Row]) -> list[Table]:
    """A table a protocol: of the edits that held right after, the share that still holds, by how many edits came later."""
    out = []
    for protocol in protocols(rows):
        mine = [row for row in rows if row["protocol"] == protocol]
        ages = sorted({(int(row["age_low"]), int(row["age_high"])) for row in mine})
        at = {(row["method"], int(row["age_low"]), int(row["age_high"])): row for row in mine}
        lines = [[name, *(_held(at.get((name, *age))) for age in ages)] for name in methods(mine)]
        heads = ["method", *(f"{low} later" if low == high else f"{low}–{high} later" for low, high in ages)]
        out.append(Table(f"Forgetting by age. {title(protocol)}", heads, lines, _AGES, key=protocol))
    return out


def _held(row: Row | None) -> str:
    if row is None or row["retained"] is None:
        return "–"
    return f"{percent(row['retained'])} [{percent(row['low'])}, {percent(row['high'])}]"


def times(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Seconds of each kind of work, apart."""
    spent = {name: dict(cost.get("seconds", {})) for name, cost in costs.items()}
    kinds = [k for k in SPENT if any(k in s for s in spent.values())]
    kinds += sorted({k for s in spent.values() for k in s} - set(kinds))
    lines = []
    for name, cost in costs.items():
        each = cost.get("seconds_an_edit")
        if each is None and cost.get("edits") and "editing" in spent[name]:
            each = spent[name]["editing"] / cost["edits"]
        if spent[name] or each is not None:
            lines.append([name, *(_number(spent[name].get(k), 2) for k in kinds), _number(each, 4)])
    return Table("Time", ["method", *(f"{k}, s" for k in kinds), "an edit, s"], lines, _CLOCK, key="time")


def memory(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """What patches weigh and what they cost to run."""
    lines = []
    for name, cost in costs.items():
        latency = cost.get("latency") or {}
        values = [
            _number(cost.get("parameters"), 0),
            _number(_scaled(cost.get("patch_bytes"), 1024), 1),
            _number(_scaled(cost.get("resident_bytes"), 2**20), 0),
            _number(_scaled(cost.get("cuda_bytes"), 2**20), 0),
            _number(_scaled(latency.get("seconds_a_token"), 1e-3), 2),
            _number(latency.get("against_base"), 2),
        ]
        if any(value != "–" for value in values):
            lines.append([name, str(cost.get("of", "–")), *values])
    heads = ["method", "of", "numbers", "patch, KiB", "peak memory, MiB", "on GPU, MiB", "a token, ms", "times the base's"]
    return Table("Size, memory and speed", heads, lines, "Peak memory is that of the whole process, the model in it.", 2, key="memory")


def _scaled(value: Any, unit: float) -> float | None:
    return None if value is None else float(value) / unit


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{float(value):.{digits}f}"


def health(rows: Sequence[Row]) -> Table:
    """What the guard saw at each look."""
    lines = []
    for row in rows:
        values = [_number(row.get(key), digits) for key, digits in (("perplexity", 3), ("perplexity_base", 3), ("kl", 4))]
        lines.append([str(row["method"]), str(row["T"]), *values, "yes" if row.get("healthy") else "no"])
    note = "Perplexity of held-out text under the edits and without them, and the divergence from the unedited model in nats a token."
    return Table("What the guard saw", ["method", "T", "perplexity", "unedited", "KL", "healthy"], lines, note, key="health")


def undone(rows: Sequence[Row]) -> Table:
    """The edits it took back, by name."""
    lines = [[str(row[k]) for k in ("method", "edit", "prompt", "target", "why")] for row in rows]
    return Table("Edits taken back", ["method", "edit", "prompt", "new answer", "why"], lines, words=5, key="undone")
