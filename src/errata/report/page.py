"""One HTML page that shows a run: scores with intervals, reliability against locality, and what the model said.

Self-contained: styles and script are in the page, and its content policy forbids loading anything.  Everything that came
from a model, a file or a user is escaped, so a model that was taught to say ``<script>`` only says it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from errata.report.scatter import scatter
from errata.report.tables import PROTOCOLS, counts, escape, grid, methods, protocols, unit

Row = Mapping[str, Any]
Record = Mapping[str, Any]

KINDS: Final[dict[str, str]] = {
    "rewrite": "prompt",
    "rephrase": "rephrase",
    "two_hop": "two hops",
    "reverse": "reverse",
    "alias": "alias",
    "multi_hop": "longer chain",
    "logical": "consequence",
    "sub_fact": "part of the answer",
    "out_of_domain": "another text",
    "same_sentiment": "wanted sentiment",
    "opposite_sentiment": "opposite sentiment",
    "neighbour": "neighbour",
    "unrelated": "unrelated",
    "same_subject": "same subject",
    "forgetfulness": "older answer",
    "distracting": "distracted neighbour",
    "question": "question",
}
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff; --panel: #f6f8fa; --good: #116329;
  --bad: #a40e26; --c0: #0072b2; --c1: #b84a00; --c2: #007a58; --c3: #a8487f; --c4: #6a4fc1; --c5: #8a6100; --c6: #444c56; --c7: #008299; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #373e47; --back: #0d1117; --panel: #161b22;
  --good: #56d364; --bad: #ff7b72; --c0: #58a6e8; --c1: #f0883e; --c2: #3fc797; --c3: #e08cc0; --c4: #a58bf5; --c5: #d6a520;
  --c6: #adbac7; --c7: #39c5d8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; } p.soft, figcaption, .kind, .count { color: var(--soft); font-size: .875rem; }
dl.notes { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; font-size: .9rem; }
dl.notes dt { color: var(--soft); } dl.notes dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td { unicode-bidi: isolate; overflow-wrap: anywhere; } table.scores { font-variant-numeric: tabular-nums; }
table.scores td:not(:first-child), table.scores th:not(:first-child) { text-align: right; white-space: nowrap; }
.scores small { display: block; color: var(--soft); } .figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 20rem; max-width: 30rem; } svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
svg .axis { stroke: var(--soft); } svg .gridline { stroke: var(--line); }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .875rem; }
input[type=search] { width: 100%; max-width: 30rem; padding: .5rem .7rem; font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: .4rem; }
.case { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; overflow: hidden; }
.case header { background: var(--panel); padding: .5rem .7rem; }
.case tr:last-child td { border-bottom: 0; } .new { color: var(--c0); font-weight: 600; }
.yes::before { content: "✓ "; color: var(--good); font-weight: 700; } .no::before { content: "✗ "; color: var(--bad); font-weight: 700; }
.label { display: none; }
@media (max-width: 44rem) { .case thead { position: absolute; left: -999rem; } .case tr, .case td { display: block; border: 0; }
  .case tr { padding: .4rem 0; border-bottom: 1px solid var(--line); } .case td { padding: .1rem .7rem; }
  .case td .label { display: inline; color: var(--soft); } dl.notes { grid-template-columns: 1fr; } }
"""

SCRIPT: Final = """
(function () {
  var box = document.getElementById("filter"), count = document.getElementById("count");
  var cases = Array.prototype.slice.call(document.querySelectorAll(".case"));
  var texts = cases.map(function (c) { return c.textContent.toLowerCase(); });
  function show() {
    var words = box.value.toLowerCase().split(/\\s+/).filter(Boolean), shown = 0;
    cases.forEach(function (c, i) {
      c.hidden = !words.every(function (w) { return texts[i].indexOf(w) >= 0; });
      if (!c.hidden) { shown += 1; }
    });
    count.textContent = shown + " of " + cases.length + " cases";
  }
  if (box) { box.hidden = false; box.addEventListener("input", show); show(); }
})();
"""


def page(title: str, summary_rows: Sequence[Row], records: Sequence[Record], notes: Mapping[str, object], max_cases: int = 200) -> str:
    """The page as one text.  ``notes`` (what to say about the run) are shown as name and value, in order.

    Beyond ``max_cases`` cases are left out, and the page says so: a browser should open it without waiting.
    """
    body = [f"<h1>{escape(title)}</h1>", _notes(notes)]
    body += [_scores(summary_rows, protocol) for protocol in protocols(summary_rows)]
    if figures := [f"<figure>{drawing}</figure>" for p in protocols(summary_rows) if (drawing := scatter(summary_rows, p))]:
        body += ["<h2>Reliability against locality</h2>", '<div class="figures">', *figures, "</div>"]
    body.append(_cases(records, max_cases))
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *filter(None, body), f"<script>{SCRIPT}</script>"]
    return "\n".join([*lines, "</body>", "</html>", ""])


def _notes(notes: Mapping[str, object]) -> str:
    if not notes:
        return ""
    return '<dl class="notes">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in notes.items()) + "</dl>"


def _scores(rows: Sequence[Row], protocol: str) -> str:
    headings, lines = grid(rows, protocol)
    name, _, meaning = PROTOCOLS.get(protocol, protocol).partition(": ")
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "".join(f'<tr><th scope="row">{escape(line[0])}</th>{"".join(map(_score, line[1:]))}</tr>' for line in lines)
    return (
        f'<h2>{escape(name)} scores</h2>\n<p class="soft">{escape(meaning)}. {unit(protocol)}, with 95 % intervals over cases.</p>\n'
        f'<div class="scroll" tabindex="0"><table class="scores"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
        f'<p class="soft">{escape(counts(rows, protocol))}.</p>'
    )


def _score(text: str) -> str:
    value, bracket, interval = text.partition(" [")
    return f"<td>{escape(value)}" + (f"<small>{escape('[' + interval)}</small>" if bracket else "") + "</td>"


def _cases(records: Sequence[Record], max_cases: int) -> str:
    names = methods(records)
    grouped: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] in ("generation", "choice"):  # no question with an answer: long sampled texts, likelihoods
            continue
        grouped.setdefault(str(record["case"]), []).append(record)
    if not grouped:
        return ""
    shown = list(grouped.values())[:max_cases]
    limit = f" The first {len(shown)} of {len(grouped)} cases are shown." if len(shown) < len(grouped) else ""
    hint = "Filter the cases: words of a prompt or an answer"
    return "\n".join(
        [
            "<h2>What the model said</h2>",
            f'<p class="soft">Greedy text before and after each edit; ✓ and ✗ compare it with the wanted answer.{limit}</p>',
            f'<input type="search" id="filter" hidden placeholder="{hint}" aria-label="{hint}">',
            '<p class="count" id="count" aria-live="polite"></p>',
            *(_case(rows, names) for rows in shown),
        ]
    )


def _case(rows: Sequence[Record], names: Sequence[str]) -> str:
    """A case: one line for each probe, one column for each method.  Methods may lack probes."""
    probes: dict[tuple[str, str, str], dict[str, Record]] = {}
    for row in rows:
        probes.setdefault((str(row["kind"]), str(row["prompt"]), str(row["target"])), {})[str(row["method"])] = row
    order = {kind: i for i, kind in enumerate(KINDS)}
    ranked = sorted(probes.items(), key=lambda item: order.get(item[0][0], len(order)))
    edit = next((row for row in rows if row["kind"] == "rewrite"), None)
    name = "Case " + escape(rows[0]["case"]) if edit is None else _edit(edit)
    heads = ["probe", "question", "wanted", "before", *names]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(_probe(kind, prompt, by_method, names) for (kind, prompt, _), by_method in ranked)
    return (
        f'<section class="case"><header><h3>{name}</h3></header><div class="scroll">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _edit(row: Record) -> str:
    return f'{escape(row["prompt"])} <span class="new">{escape("…" if row["target"] is None else row["target"])}</span>'


def _probe(kind: str, prompt: str, by_method: Mapping[str, Record], names: Sequence[str]) -> str:
    first = next(iter(by_method.values()))
    wanted = "as before" if first["target"] is None else first["target"]
    cells = [
        f'<td class="kind">{escape(KINDS.get(kind, kind))}</td>',
        f"<td>{escape(prompt)}</td>",
        f'<td><span class="label">wanted: </span>{escape(wanted)}</td>',
        _said("before", first["gen_before"], None if first["target"] is None else first["gen_match_before"]),
    ]
    for name in names:
        row = by_method.get(name)
        if row is None:
            cells.append("<td>–</td>")
        else:
            cells.append(_said(name, row["gen_after"], row["gen_agree"] if row["target"] is None else row["gen_match_after"]))
    return f"<tr>{''.join(cells)}</tr>"


def _said(who: str, text: object, right: object) -> str:
    mark = "" if right is None else ' class="yes"' if right else ' class="no"'
    words = "–" if text is None else escape(text) or "(nothing)"
    # The mark is drawn by CSS; a reader of the page's text gets it as a word.
    spoken = "" if right is None else f' title="{"as wanted" if right else "not as wanted"}"'
    return f'<td{mark}{spoken}><span class="label">{escape(who)}: </span>{words}</td>'
