"""Summary rows (`errata.score.metrics.summarise`) as text.  Methods are rows, metrics are columns.

Teacher-forced, generated, likelihood and sampled numbers answer different questions, so they never share a table.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

Row = Mapping[str, Any]

# Metric -> heading, in reading order: the edit, what follows from it, what should stay.  Others follow under their own name.
HEADINGS: Final[dict[str, str]] = {
    "reliability": "reliability",
    "generality": "generality",
    "portability": "portability",
    "two_hop": "two hops",
    "reverse": "reverse",
    "alias": "alias",
    "multi_hop": "longer chains",
    "logical": "logical consequences",
    "sub_fact": "parts of the answer",
    "out_of_domain": "another text",
    "locality_agreement": "locality (as before)",
    "locality_correct": "locality (true)",
    "locality_correct_known": "locality (true, known)",
    "same_subject": "same subject (as before)",
    "forgetfulness": "older answers (as before)",
    "distracting": "distracted neighbours (true)",
    "choices": "choices",
    "questions": "questions",
    "sentiment": "ES of ConvSent",
    "S": "S (harmonic mean)",
    "ES": "ES (edited prompt)",
    "PS": "PS (rephrased)",
    "NS": "NS (neighbours)",
    "EM": "EM (edited prompt)",
    "PM": "PM (rephrased)",
    "NM": "NM (neighbours)",
    "GE": "GE (fluency)",
    "RS": "RS (consistency)",
}
PROTOCOLS: Final[dict[str, str]] = {
    "teacher_forced": "Teacher-forced: share of the answer's tokens, the answer being fed",
    "generated": "Generated: the model's own text equals the answer",
    "free_tokens": "Free tokens: share of the answer's tokens at the same place of the model's own text (EasyEdit's vanilla generation)",
    "likelihood": "Likelihood: the wanted answer against its rival; ES, PS, NS share where it is likelier, EM, PM, NM by how much",
    "sampled": "Sampled: longer text; n-gram entropy in bits (GE) and likeness to texts about the new answer (RS)",
}
BEFORE: Final = "unedited model"


def escape(value: object) -> str:
    """A text for any place in a page.  Lone surrogates and control characters, which HTML cannot hold, become "�"."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "�", str(value)), quote=True)


def protocols(rows: Iterable[Row]) -> list[str]:
    """The protocols that occur, in the usual order."""
    found = {row["protocol"] for row in rows}
    return [*(p for p in PROTOCOLS if p in found), *sorted(found - set(PROTOCOLS))]


def metrics(rows: Iterable[Row]) -> list[str]:
    """The metrics that occur, in reading order."""
    found = {row["metric"] for row in rows}
    return [*(m for m in HEADINGS if m in found), *sorted(found - set(HEADINGS))]


def methods(rows: Iterable[Row]) -> list[str]:
    """The methods in the order they were scored."""
    return list(dict.fromkeys(row["method"] for row in rows))


def unit(protocol: str) -> str:
    """What the cells of a protocol's table are in; an entropy is no share, but papers print it times 100 as well."""
    return "Times 100" if protocol == "sampled" else "Percent"


def percent(value: float | None) -> str:
    """0.9137 -> "91.4"; a dash where nothing was measured."""
    return "–" if value is None else f"{100 * value:.1f}"


def cell(row: Row | None) -> str:
    """Value and interval in percent: "91.4 [89.0, 93.5]"."""
    return "–" if row is None else f"{percent(row['value'])} [{percent(row['low'])}, {percent(row['high'])}]"


def grid(rows: Sequence[Row], protocol: str) -> tuple[list[str], list[list[str]]]:
    """(headings, lines of cells) for one protocol; the first line is the unedited model's.

    Methods that were scored on different cases have different "before" values; each of them then gets its own such line.
    """
    mine = [row for row in rows if row["protocol"] == protocol]
    names, columns = methods(mine), metrics(mine)
    at = {(row["method"], row["metric"]): row for row in mine}
    before = {
        name: [percent(row["before"]) if (row := at.get((name, column))) is not None else "–" for column in columns] for name in names
    }
    distinct = list({tuple(line): line for line in before.values()}.values())
    same = len(distinct) == 1
    lines = [[BEFORE if same else f"{BEFORE}, cases of {name}", *line] for name, line in before.items()]
    lines = lines[:1] if same else lines
    lines += [[name, *(cell(at.get((name, column))) for column in columns)] for name in names]
    return ["method", *(HEADINGS.get(column, column) for column in columns)], lines


def counts(rows: Sequence[Row], protocol: str) -> str:
    """ "reliability 300 cases, 300 probes; …": what the numbers of one protocol rest on."""
    mine = [row for row in rows if row["protocol"] == protocol]
    parts = []
    for name in metrics(mine):
        here = [row for row in mine if row["metric"] == name]
        cases, probes = ([int(row[key]) for row in here] for key in ("n_cases", "n_probes"))
        parts.append(f"{HEADINGS.get(name, name)} {_range(cases)} cases, {_range(probes)} probes")
    return "; ".join(parts)


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def width(text: str) -> int:
    """Terminal columns: wide East Asian characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, to: int, right: bool) -> str:
    gap = " " * (to - width(text))
    return gap + text if right else text + gap


def terminal(rows: Sequence[Row]) -> str:
    """Plain text with aligned columns, one table for each protocol; "" without rows."""
    blocks = []
    for protocol in protocols(rows):
        headings, lines = grid(rows, protocol)
        widths = [max(width(line[i]) for line in (headings, *lines)) for i in range(len(headings))]
        text = ["  ".join(_pad(part, widths[i], right=i > 0) for i, part in enumerate(line)).rstrip() for line in (headings, *lines)]
        text.insert(1, "  ".join("─" * w for w in widths))
        blocks.append("\n".join([PROTOCOLS.get(protocol, protocol), "", *text, "", _footer(rows, protocol)]))
    return "\n\n".join(blocks) + ("\n" if blocks else "")


def markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown tables; "" without rows."""
    blocks = []
    for protocol in protocols(rows):
        headings, lines = grid(rows, protocol)
        table = [headings, ["---", *["---:"] * (len(headings) - 1)], *lines]
        text = ["| " + " | ".join(_markdown_cell(part) for part in line) + " |" for line in table]
        blocks.append("\n".join([f"**{PROTOCOLS.get(protocol, protocol)}**", "", *text, "", _footer(rows, protocol)]))
    return "\n\n".join(blocks) + ("\n" if blocks else "")


def _markdown_cell(text: str) -> str:
    # A bar would end the cell, a line break the row, and a tag would be read as one.
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _footer(rows: Sequence[Row], protocol: str) -> str:
    return f"{unit(protocol)}, 95 % intervals over cases. {counts(rows, protocol)}."
