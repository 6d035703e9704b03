"""One HTML page that shows runs: scores with intervals, what edits cost elsewhere and later, and what the model said.

Self-contained: styles, script and data are in the page, and its content policy forbids loading anything.  Everything that came
from a model, a file or a user is escaped, so a model that was taught to say ``<script>`` only says it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Final

from errata.report import cases, contents, gate_maps, retention, svg
from errata.report.layout import UNHOLDABLE, Table
from errata.report.scatter import scatter
from errata.report.sections import Section, of
from errata.report.tables import escape, headline, methods, protocols, scores, title
from errata.request import LOCAL_KINDS

Row = Mapping[str, Any]
Record = Mapping[str, Any]

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STAYS: Final = (*LOCAL_KINDS, "same_subject", "forgetfulness", "watch")  # kinds that an edit should leave as they are
SAID: Final = (
    "Greedy text before and after each edit; ✓ and ✗: it begins with the wanted answer, or, where none is, it is as before over the whole "
    "answer. “fed”: how much of the wanted answer is likeliest when its beginning is given."
)


def page(
    title: str, summary_rows: Sequence[Row], records: Sequence[Record], notes: Mapping[str, object], max_cases: int | None = None
) -> str:
    """The page of one comparison that is in memory; see `whole`."""
    return whole(title, [Section("", rows=summary_rows, records=of(records))], notes, max_cases=max_cases)


def whole(
    title: str,
    sections: Sequence[Section],
    notes: Mapping[str, object],
    manifests: Mapping[str, Mapping[str, Any]] | None = None,
    gated: Sequence[Mapping[str, Any]] = (),
    max_cases: int | None = None,
) -> str:
    """The page as one text.

    notes       what to say about all of it, name and value, in order;  ``manifests``: run -> its manifest
    gated       documents of `errata analyse gates`
    max_cases   of each section that are in the page (all); the rest is left out and the page says so
    """
    texts = cases.Texts()
    browsers = [cases.browser(_columns(section), texts, max_cases) for section in sections]
    body = [f"<h1>{escape(title)}</h1>", _notes(notes), _contents(sections, bool(gated), bool(manifests))]
    for i, (section, browser) in enumerate(zip(sections, browsers, strict=True)):
        body += _section(section, i, len(sections) > 1, bool(browser["cases"]))
    body += _gates(gated)
    body += _manifests(manifests or {})
    if any(browser["cases"] for browser in browsers):
        data = {"texts": texts.all, "kinds": cases.KINDS, "stays": STAYS, "sections": browsers}
        body.append(f'<script type="application/json" id="cases-data">{island(data)}</script>')
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_file('page.css')}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", "<main>", *filter(None, body), "</main>"]
    return "\n".join([*lines, f"<script>\n{_file('page.js')}</script>", "</body>", "</html>", ""])


def _file(name: str) -> str:
    return resources.files("errata.report").joinpath(name).read_text(encoding="utf-8")


def island(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("-->", "--\\u003e")


def _columns(section: Section) -> list[tuple[str, str, Any]]:
    found = [(name, cases.AFTER, read()) for name, read in section.records.items()]
    return found + [(name, cases.SOON, read()) for name, read in section.right_after_records.items()]


def _notes(notes: Mapping[str, object]) -> str:
    if not notes:
        return ""
    return '<dl class="notes">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in notes.items()) + "</dl>"


def _contents(sections: Sequence[Section], gated: bool, manifests: bool) -> str:
    """Links to the parts of a page with several."""
    links = [(f"s{i}", section.title) for i, section in enumerate(sections)] if len(sections) > 1 else []
    return _links([*links, *[("gates", "Gates")] * gated, *[("manifest", "Manifest")] * manifests], "Sections")


def _links(links: Sequence[tuple[str, str]], label: str) -> str:
    if not links:
        return ""
    items = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name in links)
    return f'<nav aria-label="{escape(label)}"><ul>{items}</ul></nav>'


def _section(section: Section, number: int, several: bool, browsable: bool) -> list[str]:
    head = [f'<h2 id="s{number}">{number + 1}. {escape(section.title)}</h2>'] if several else []
    apart = [f'<p class="soft">Not in one table with {escape("; and with ".join(section.apart))}.</p>'] if section.apart else []
    parts = {
        "Scores": [*map(_scored, scores(section.rows)), _plain(contents.micro(section.micro))],
        "Reliability against locality": _scatters(section),
        "After T edits": _curves(section),
        "Paired differences": [_plain(table) for table in contents.differences(section.differences)],
        "Forgetting": [_plain(table) for table in contents.forgetting(section.forgetting)],
        "Time and memory": [_bars(section.costs), _plain(contents.times(section.costs)), _plain(contents.memory(section.costs))],
        "Health": [_plain(contents.health(section.health)), _plain(contents.undone(section.undone))],
        "What the model said": _browser(number) if browsable else [],
    }
    shown = {name: found for name, part in parts.items() if (found := [text for text in part if text])}
    names = [(f"s{number}-{i}", name) for i, name in enumerate(shown)]
    body = [text for (anchor, _), part in zip(names, shown.values(), strict=True) for text in (f'<div id="{anchor}"></div>', *part)]
    if not several:  # no heading stands above them: one level up
        body = [text.replace("<h3>", "<h2>").replace("</h3>", "</h2>") for text in body]
    return [*head, _notes(section.facts), *apart, _links(names, f"Parts of section {number + 1}"), *body]


def _scored(table: Table) -> str:
    what = "robustness" if table.title.startswith("Robustness. ") else "scores"
    name, _, meaning = title(table.key).partition(": ")
    return _table(table, f"{name} {what}", meaning)


def _browser(number: int) -> list[str]:
    off = "<p>The cases are shown by the script of this page, which is turned off.</p>"
    return ["<h3>What the model said</h3>", f'<p class="soft">{SAID}</p>', f'<div data-cases="{number}">{off}</div>']


def _scatters(section: Section) -> list[str]:
    figures = [f"<figure>{drawing}</figure>" for p in protocols(section.rows) if (drawing := scatter(section.rows, p))]
    if not figures:
        return []
    return ["<h3>Reliability against locality</h3>", svg.legend(methods(section.rows)), '<div class="figures">', *figures, "</div>"]


def _curves(section: Section) -> list[str]:
    tables = {table.key: table for table in contents.after(section.retention, section.right_after)}
    out = ["<h3>After T edits</h3>", svg.legend(methods(section.retention))] if tables else []
    first = headline(section.retention)
    for protocol, table in tables.items():
        panels = "".join(f"<figure>{panel}</figure>" for panel in retention.panels(section.retention, protocol))
        name = escape(title(protocol).partition(":")[0])
        opened = " open" if protocol == first or first not in tables else ""
        numbers = f"<details><summary>{name}: the numbers</summary>{_grid(table)}</details>"
        out.append(f'<details{opened}><summary>{name}</summary><div class="figures">{panels}</div>{numbers}</details>')
    return out


def _plain(table: Table) -> str:
    """A table under its own title; nothing where it is empty."""
    name, _, meaning = table.title.partition(": ")
    return _table(table, name, meaning) if table.lines else ""


def _table(table: Table, heading: str, meaning: str) -> str:
    said = f'<p class="soft">{escape(meaning[:1].upper() + meaning[1:])}.</p>\n' if meaning else ""
    return f"<h3>{escape(heading)}</h3>\n{said}{_grid(table)}"


def _grid(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{" class=number" if i >= table.words else ""}>{escape(text)}</th>' for i, text in enumerate(table.headings)
    )
    rows = []
    for i, line in enumerate(table.lines):
        cells = [f"<td>{escape(text)}</td>" if j < table.words else _score(text) for j, text in enumerate(line) if j]
        pinned = ' class="first"' if i < table.pinned else ""
        rows.append(f'<tr{pinned}><th scope="row">{escape(line[0])}</th>{"".join(cells)}</tr>')
    note = f'\n<p class="soft">{escape(table.note)}</p>' if table.note else ""
    label = escape(table.title.partition(":")[0])
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table class="scores"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _score(text: str) -> str:
    value, bracket, interval = text.partition(" [")
    clear = bracket and interval.endswith(contents.CLEAR)
    small = f"<small>{escape('[' + interval)}</small>" if bracket else ""
    return f'<td class="number{" clear" if clear else ""}">{escape(value)}{small}</td>'


def _bars(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds of each method as one bar, by kind of work."""
    spent = {name: cost["seconds"] for name, cost in costs.items() if cost.get("seconds")}
    most = max((sum(s.values()) for s in spent.values()), default=0.0)
    if not most:
        return ""
    kinds = [k for k in contents.SPENT if any(s.get(k, 0) > 0.005 * most for s in spent.values())]
    rows = []
    for name, seconds in spent.items():
        said = ", ".join(f"{k} {seconds[k]:.1f} s" for k in kinds if seconds.get(k))
        parts = "".join(
            f'<span style="--w: {100 * seconds.get(k, 0) / most:.2f}%; --k: {svg.colour(i)}"></span>' for i, k in enumerate(kinds)
        )
        bar = f'<span class="bar" role="img" aria-label="{escape(said)}" title="{escape(said)}">{parts}</span>'
        rows.append(f"<span>{escape(name)}</span>{bar}<span>{sum(seconds.values()):.1f} s</span>")
    keys = "".join(f'<li><span class="key" style="--k: {svg.colour(i)}"></span> {escape(k)}</li>' for i, k in enumerate(kinds))
    return f'<h3>Where the time went</h3>\n<ul class="legend">{keys}</ul><div class="bars">{"".join(rows)}</div>'


def _gates(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    for i, document in enumerate(documents):
        parts = [*gate_maps.heat_maps(document), *(_plain(table) for table in gate_maps.tables(document))]
        if parts:
            out += [f'<h2 id="gates{i or ""}">Gates of {escape(gate_maps.name(document))}</h2>', *parts]
    return out


def _manifests(manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    out = ['<h2 id="manifest">Manifest</h2>'] if manifests else []
    for name, manifest in manifests.items():
        text = UNHOLDABLE.sub("�", json.dumps(manifest, indent=1, ensure_ascii=False))
        out.append(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    return out
