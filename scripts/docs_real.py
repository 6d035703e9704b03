"""The tables of docs/results/real.md, computed from what `scripts/gather.py` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from docs_methods import GROUPS, link
from docs_results import MODELS, RESULTS, SINGLE, TITLES, Cell, cells, costs, of, percent, row, table

DIFFERENCES = tuple(column for column in SINGLE if column[0] not in ("ES", "PS"))
ORDER = [name for names in GROUPS.values() for name in names]


def points(found: Mapping[str, Any]) -> str:
    """A difference; bold where its interval leaves out 0."""
    text = f"{100 * found['value']:+.0f} [{100 * found['low']:+.0f}, {100 * found['high']:+.0f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def in_order(found: Mapping[str, Cell]) -> dict[str, Cell]:
    """As the pages have the methods; a variant stands behind its method."""
    return {label: found[label] for label in sorted(found, key=lambda label: (ORDER.index(label.split()[0]), label))}


def single(model: str) -> str:
    """Every method on a model's facts, and what each does otherwise than BaFT."""
    found = in_order(of("single", model))
    if not found:
        return "Not measured yet.\n"
    heads = ["", "n", *(head for head, _, _ in SINGLE), "s an edit", "kB"]
    rows = [[link(label, "../"), str(c["n"]), *(percent(row(c, m, p)) for _, m, p in SINGLE), *costs(c)] for label, c in found.items()]
    out = table(heads, [_unedited(next(iter(found.values()))), *rows])
    other = [
        [link(label, "../"), *(points(_pair(c, m, p)) for _, m, p in DIFFERENCES)] for label, c in found.items() if c.get("difference")
    ]
    if other:
        out += "\nEach method minus BaFT on the same facts, points, paired by case; bold where the interval leaves out 0.\n\n"
        out += table(["", *(head for head, _, _ in DIFFERENCES)], other)
    return out


def _pair(cell: Cell, metric: str, protocol: str) -> Mapping[str, Any]:
    pair: Mapping[str, Any] = next(d for d in cell["difference"] if d["metric"] == metric and d["protocol"] == protocol)
    return pair


def _unedited(cell: Cell) -> Sequence[str]:
    """The model as a cell saw it before its edits."""
    out = []
    for _, metric, protocol in SINGLE:
        found = row(cell, metric, protocol)
        same = metric in ("locality_first_word", "watch")  # agreement with itself
        out.append("100" if same else "–" if found is None or found["before"] is None else f"{100 * found['before']:.0f}")
    return ["unedited", str(cell["n"]), *out, "", ""]


def continual(model: str, consistent: bool, protocol: str) -> str:
    """Methods on one stream of ZsRE: reliability / generality / locality at each mark, and what the end says of forgetting and health."""
    asked = {c["method"]: c for c in cells("zsre") if c["model"] == MODELS[model] and bool(c["benchmark"].get("consistent")) is consistent}
    if not asked:
        return "Not measured yet.\n"
    found = in_order(asked)
    marks = sorted({r["T"] for c in found.values() for r in c["rows"]})
    free = protocol == "starts"
    last = free and any(r["metric"] == "reliability_last" for c in found.values() for r in c["rows"])
    heads = ["", "right after", *(f"T = {t}" for t in marks)]
    heads += (["as last written", "still held"] if last else ["still held"] if free else []) + (["perplexity", "s an edit"] if free else [])
    rows = []
    for label, c in found.items():
        line = [link(label, "../"), _three(c["right_after"], protocol), *(_three(c["rows"], protocol, t) for t in marks)]
        if free:
            line += [_pair_of(c["rows"], ("reliability_last", "generality_last"), marks[-1])] if last else []
            line += [_held(c), _perplexity(c, marks[-1]), costs(c)[0]]
        rows.append(line)
    return table(heads, rows)


def _one(rows: Sequence[Mapping[str, Any]], metric: str, protocol: str, mark: int | None = None) -> Mapping[str, Any] | None:
    return next((r for r in rows if (r["metric"], r["protocol"], r.get("T")) == (metric, protocol, mark)), None)


def _three(rows: Sequence[Mapping[str, Any]], protocol: str, mark: int | None = None) -> str:
    """reliability / generality / locality, and reliability's interval."""
    of_three = [_one(rows, metric, protocol, mark) for metric in ("reliability", "generality", "locality_agreement")]
    if of_three[0] is None:
        return "–"
    numbers = " / ".join("–" if r is None else f"{100 * r['value']:.0f}" for r in of_three)
    return f"{numbers} [{100 * of_three[0]['low']:.0f}, {100 * of_three[0]['high']:.0f}]"


def _pair_of(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], mark: int) -> str:
    return " / ".join("–" if (r := _one(rows, m, "starts", mark)) is None else f"{100 * r['value']:.0f}" for m in metrics)


def _held(cell: Cell) -> str:
    """Of the edits that held right after, the share that holds at the end: both of all ages."""
    ages = [r for r in cell.get("forgetting", ()) if r["protocol"] == "starts" and r["held"]]
    held = sum(r["held"] for r in ages)
    return f"{100 * sum(r['held'] * r['retained'] for r in ages) / held:.0f} of {held}" if held else "–"


def _perplexity(cell: Cell, mark: int) -> str:
    found = next((h for h in cell.get("health", ()) if h["T"] == mark), None)
    return "–" if found is None else f"{found['perplexity']:,.1f}" if found["perplexity"] < 1e4 else f"{found['perplexity']:.0e}"


JOINT = (
    ("reliability", "reliability", "starts"), ("forced", "reliability", "teacher_forced"), ("generality", "generality", "starts"),
    ("first word kept", "locality_first_word", "starts"), ("watched", "watch", "starts"), ("PS", "PS", "likelihood"), ("NS", "NS", "likelihood"),
)  # fmt: skip


def joint(model: str, size: int) -> str:
    """Methods on joint patches of so many facts, all on one model at the end."""
    found = {c["method"]: c for c in cells("joint") if c["model"] == MODELS[model] and c["scenario"].get("size") == size}
    if not found:
        return "Not measured yet.\n"
    rows = [
        [link(label, "../"), str(c["n"]), *(percent(row(c, m, p)) for _, m, p in JOINT), *costs(c)] for label, c in in_order(found).items()
    ]
    return table(["", "n", *(head for head, _, _ in JOINT), "s an edit", "kB"], rows)


SURVIVES = (
    ("other names, seen", "subject_seen"), ("unseen", "subject_unseen"), ("shuffled, seen", "shuffled_seen"), ("unseen", "shuffled_unseen"),
    ("behind 300 words", "long_unseen"), ("as a question", "question_form"), ("negation", "negation"),
)  # fmt: skip
_FIRST = (("reliability", "reliability"), ("generality", "generality"))
_LAST = (("first word kept", "locality_first_word"), ("watched", "watch"))


def robust(model: str) -> str:
    """Free answers to what an edit should survive, and the neighbours beside them."""
    found = in_order(of("robust", model))
    if not found:
        return "Not measured yet.\n"
    columns = (*_FIRST, *SURVIVES, *_LAST)
    rows = [
        [link(label, "../"), str(c["n"]), *(percent(row(c, m, "starts")) for _, m in columns), costs(c)[0]] for label, c in found.items()
    ]
    return table(["", "n", *(head for head, _ in columns), "s an edit"], rows)


def openings() -> str:
    """What `scripts/gate_openings.py` counted."""
    rows = []
    for model, title in TITLES.items():
        path = RESULTS / "real" / f"openings-{MODELS[model]}.json"
        for r in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else ():
            held = [f"{right} of {asked}" for right, asked in (r["rewrite"], r["rephrase"])]
            rows.append([title, "trained" if r["train_gates"] else "solved", str(r["edits"]), f"{100 * r['open']:.3f} %", *held])
    return table(["", "gates", "edits", "open", "edited prompts as wanted", "rephrasings"], rows) if rows else "Not measured yet.\n"


def gate_parts() -> dict[str, str]:
    """Name of a computed part of subject-gates.md -> its text."""
    return {"openings": openings()}


def parts() -> dict[str, str]:
    """Name of a computed part of real.md -> its text."""
    streams = {"published": False, "consistent": True}
    return {
        **{f"single_{model}": single(model) for model in MODELS},
        **{f"joint_{model}_{size}": joint(model, size) for model in MODELS for size in (10, 50)},
        **{f"robust_{model}": robust(model) for model in MODELS},
        **{f"zsre_{m}_{s}_{p}": continual(m, c, p) for m in MODELS for s, c in streams.items() for p in ("starts", "teacher_forced")},
    }
