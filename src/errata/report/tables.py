"""Summary rows (`errata.score.metrics.summarise`) as text.  Methods are rows, metrics are columns.

Free text that begins with the answer is the headline.  Free text, teacher-forced, likelihood and sampled numbers answer different
questions, so they never share a table.  Metrics that are equal in every row of a table are one column with both names.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from errata.report import layout
from errata.report.layout import UNHOLDABLE, Table

Row = Mapping[str, Any]

# What `errata score --robustness` adds: a table of its own, beside `_REFERENCE`, what the edit does where nothing is changed.
ROBUST: Final[dict[str, str]] = {
    "paraphrase_seen": "given paraphrases (seen)",
    "subject_seen": "subject paraphrased (seen)",
    "subject_unseen": "subject paraphrased (unseen)",
    "shuffled_seen": "subject shuffled (seen)",
    "shuffled_unseen": "subject shuffled (unseen)",
    "long_seen": "behind 300 words (seen)",
    "long_unseen": "behind 300 words (unseen)",
    "long_tokens_seen": "behind 512 tokens (seen)",
    "long_tokens_unseen": "behind 512 tokens (unseen)",
    "question_form": "as a question",
    "completion_form": "as a sentence to complete",
    "chat": "in the chat template",
    "true_false": "true or false (chance 50)",
    "negation": "negated: new answer not said",
}
_REFERENCE: Final = ("reliability", "generality", "ES", "PS")
# Metric -> heading, in reading order: the edit, what follows from it, what should stay.  Others follow under their own name.
HEADINGS: Final[dict[str, str]] = {
    "reliability": "reliability",
    "generality": "generality",
    "reliability_last": "as last written of the fact",
    "generality_last": "as last written, rephrased",
    "reliability_ceiling": "not overwritten by a later edit",
    "portability": "portability",
    "portability_by_kind": "portability (mean of kinds)",
    "two_hop": "two hops",
    "reverse": "reverse",
    "alias": "alias",
    "multi_hop": "longer chains",
    "logical": "logical consequences",
    "sub_fact": "parts of the answer",
    "out_of_domain": "another text",
    "locality_agreement": "locality (as before)",
    "locality_agreement_by_kind": "locality (as before, mean of kinds)",
    "locality_first_word": "locality (first word as before)",
    "watch": "neighbours kept (watched)",
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
    **ROBUST,
}
PROTOCOLS: Final[dict[str, str]] = {
    "starts": "Begins with: the model's own text begins with the answer",
    "generated": "Generated: the model's own text equals the answer",
    "contains": "Contains: the answer stands somewhere in the model's own text",
    "teacher_forced": "Teacher-forced: share of the answer's tokens, the answer being fed",
    "free_tokens": "Free tokens: share of the answer's tokens at the same place of the model's own text (EasyEdit's vanilla generation)",
    "likelihood": "Likelihood: the wanted answer against its rival; ES, PS, NS share where it is likelier, EM, PM, NM by how much",
    "sampled": "Sampled: longer text; n-gram entropy in bits (GE) and likeness to texts about the new answer (RS)",
}
_HEADLINES: Final = ("starts", "generated")  # older records have only the second
_STAYS: Final = {
    "starts": " As before: the text is the same over as many tokens as the known answer has.",
    "generated": " As before: the whole text is the same.",
}
_POOLED: Final = ("portability", "locality_agreement", "locality_correct", "locality_correct_known")
_AS_BEFORE: Final = ("locality_agreement", "same_subject", "forgetfulness")
_BY_KIND: Final = ("portability_by_kind", "locality_agreement_by_kind")
_ALIKE: Final = ("method", "minus", "T", "value", "low", "high", "before", "n_cases", "n_probes")  # of metrics that are shown as one
_BEFORE: Final = "unedited model"
JUDGED: Final = "judged "  # a judge's protocol is this and its name


def title(protocol: str) -> str:
    """The protocol's name and, behind a colon, what it is."""
    if protocol.startswith(JUDGED):
        return f"Judged by {protocol.removeprefix(JUDGED)}: what this judge says of the model's own text"
    return PROTOCOLS.get(protocol, protocol)


def escape(value: object) -> str:
    """A text for any place in a page.  Lone surrogates and control characters, which HTML cannot hold, become "�"."""
    return html.escape(UNHOLDABLE.sub("�", str(value)), quote=True)


def protocols(rows: Iterable[Row]) -> list[str]:
    """The protocols that occur, in the usual order."""
    found = {row["protocol"] for row in rows}
    return [*(p for p in PROTOCOLS if p in found), *sorted(found - set(PROTOCOLS))]


def metrics(rows: Iterable[Row]) -> list[str]:
    """The metrics that occur, in reading order."""
    found = {row["metric"] for row in rows}
    return [*(m for m in HEADINGS if m in found), *sorted(found - set(HEADINGS))]


def headline(rows: Iterable[Row]) -> str:
    """The protocol that is shown where there is room for one."""
    found = {row["protocol"] for row in rows}
    return next((protocol for protocol in _HEADLINES if protocol in found), _HEADLINES[0])


def merged(rows: Iterable[Row]) -> dict[str, str]:
    """{metric: heading} of rows of one protocol, in reading order: metrics that are equal in all rows (numbers, intervals and counts alike)
    stand once, under the first of them and all their names."""
    rows = list(rows)
    said: dict[str, set[tuple[Any, ...]]] = {}
    for row in rows:
        said.setdefault(row["metric"], set()).add(tuple(row.get(key) for key in _ALIKE))
    groups: dict[frozenset[tuple[Any, ...]], list[str]] = {}
    for metric in metrics(rows):
        groups.setdefault(frozenset(said[metric]), []).append(metric)
    return {group[0]: " = ".join(HEADINGS.get(metric, metric) for metric in group) for group in groups.values()}


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
    names, columns = methods(mine), merged(mine)
    at = {(row["method"], row["metric"]): row for row in mine}
    before = {
        name: [percent(row["before"]) if (row := at.get((name, column))) is not None else "–" for column in columns] for name in names
    }
    distinct = list({tuple(line): line for line in before.values()}.values())
    same = len(distinct) == 1
    lines = [[_BEFORE if same else f"{_BEFORE}, cases of {name}", *line] for name, line in before.items()]
    lines = lines[:1] if same else lines
    lines += [[name, *(cell(at.get((name, column))) for column in columns)] for name in names]
    return ["method", *columns.values()], lines


def turned(rows: Sequence[Row], protocol: str) -> tuple[list[str], list[list[str]]]:
    """`grid` with metrics down and methods across."""
    headings, lines = grid(rows, protocol)
    _, *across = headings
    return ["metric", *(line[0] for line in lines)], [
        [name, *cells] for name, *cells in zip(across, *(line[1:] for line in lines), strict=True)
    ]


def main(rows: Iterable[Row]) -> list[Row]:
    """The rows that are not of the robustness table."""
    return [row for row in rows if row["metric"] not in ROBUST]


def robust(rows: Iterable[Row]) -> list[Row]:
    """The rows of the robustness table, `_REFERENCE` first; none without a robustness metric."""
    rows = list(rows)
    there = {row["protocol"] for row in rows if row["metric"] in ROBUST}
    return [row for row in rows if row["protocol"] in there and (row["metric"] in ROBUST or row["metric"] in _REFERENCE)]


def scores(rows: Sequence[Row]) -> list[Table]:
    """A table a protocol, and behind them those of robustness, with metrics down."""
    out = []
    for part, before, form, pinned in ((main(rows), "", grid, True), (robust(rows), "Robustness. ", turned, False)):
        for protocol in protocols(part):
            headings, lines = form(part, protocol)
            first = len(lines) - len(methods([row for row in part if row["protocol"] == protocol])) if pinned else 0
            out.append(Table(before + title(protocol), headings, lines, _footer(part, protocol), 1, first, protocol))
    return out


def counts(rows: Sequence[Row], protocol: str) -> str:
    """ "reliability 300 cases, 300 probes; …": what the numbers of one protocol rest on."""
    mine = [row for row in rows if row["protocol"] == protocol]
    parts = []
    for name, heading in merged(mine).items():
        here = [row for row in mine if row["metric"] == name]
        cases, probes = ([int(row[key]) for row in here] for key in ("n_cases", "n_probes"))
        parts.append(f"{heading} {span(cases)} cases, {span(probes)} probes")
    return "; ".join(parts)


def averages(rows: Iterable[Row], protocol: str) -> str:
    """What "as before" means in the table of a protocol, and how it averages the probes of a case that has several kinds of them."""
    found = {row["metric"] for row in rows if row["protocol"] == protocol}
    stays = _STAYS.get(protocol, "") if found & {*_AS_BEFORE} else ""
    said = " Portability and locality of a case: the mean over all its probes"
    if found & {*_BY_KIND}:
        return f"{stays}{said}; (mean of kinds): over its kinds of probe, of each kind's mean, as EasyEdit averages."
    return stays + (f"{said}." if found & {*_POOLED} else "")


def span(values: Sequence[int]) -> str:
    """ "12" where all are 12, else "3–12"."""
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def terminal(rows: Sequence[Row]) -> str:
    """Plain text with aligned columns, one table for each protocol; "" without rows."""
    return layout.terminal(scores(rows))


def markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown tables; "" without rows."""
    return layout.markdown(scores(rows))


def _footer(rows: Sequence[Row], protocol: str) -> str:
    return f"{unit(protocol)}, 95 % intervals over cases. {counts(rows, protocol)}.{averages(rows, protocol)}"
