"""REP and the robustness suite on the almanac (docs/results/rep).

    python scripts/evidence_rep.py suite [--only LABEL,…]      # 100 test cases, each edit alone: every method with and without REP, and others
    python scripts/evidence_rep.py ablation [--only LABEL,…]   # REP on ROME, without one part at a time; and the published losses
    python scripts/evidence_rep.py scope                       # an adaptor set an edit against a shared one: joint patches, and one after another
    python scripts/evidence_rep.py tables

Hyper-parameters are the almanac presets, chosen on ``dev``.  Each label is kept in its own file.  Long contexts: one unseen passage of 300
words a case (the suite asks behind seen ones and 512 tokens too; they take most of the time and are left out here).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from docs_results import slug
from evidence import OUT, arguments, cases, editor, held_out, write
from evidence_editors import lines

import errata
from errata import run
from errata.core.model import LM
from errata.request import Case
from errata.score import robustness
from errata.score.evaluator import AnswerCache, score
from errata.score.metrics import difference, summarise

FOLDER = "rep"
FAMILY = ("rome", "r-rome", "memit", "emmet", "alphaedit")
OTHERS = ("none", "baft", "reft", "wise", "grace")
LEFT_OUT = ("long_seen", "long_tokens_seen", "long_tokens_unseen", "two_hop", "reverse", "alias")
COLUMNS = (
    "reliability", "generality", "subject_seen", "subject_unseen", "shuffled_seen", "shuffled_unseen", "long_unseen", "question_form",
    "negation", "locality_agreement",
)  # fmt: skip
# REP on ROME with one thing changed.  As published: its two losses, its steps and rate, its threshold.
PUBLISHED = {"steps": 10, "lr": 5e-4, "aggregation": 1.0, "consistency": 50_000.0, "match": 0.0, "closing": 0.0, "tau": 0.9}
AGGREGATION = {"aggregation": 1.0, "match": 0.0, "consistency": 1000.0}
ABLATION: dict[str, dict[str, Any]] = {
    "rep": {},
    "published": PUBLISHED,
    "published, 200 steps": {**PUBLISHED, "steps": 200, "lr": 2e-3},
    "aggregation": AGGREGATION,
    "aggregation, no normalisation": {**AGGREGATION, "normalise": False},
    "no projection": {"projection": "constant"},
    "no gate": {"gate": False},
    "no consistency": {"consistency": 0.0},
    "no closing": {"closing": 0.0},
    "no shuffled": {"surfaces": ["names", "prefixes", "long"]},
    "no names": {"surfaces": ["shuffled", "prefixes", "long"]},
}


def widened(lm: LM, n: int, left_out: Sequence[str] = LEFT_OUT) -> list[Case]:
    """Test cases with the probes of the suite that are asked here."""
    wide = robustness.add_robustness_probes(lm, cases("test", n), long_seen=0)
    return [replace(c, probes=tuple(p for p in c.probes if p.kind not in left_out)) for c in wide]


def keep(what: str, label: str, lm: LM, records: Sequence[dict[str, Any]], stacks: Sequence[Any], seconds: float, **more: Any) -> None:
    (OUT / FOLDER).mkdir(parents=True, exist_ok=True)
    rows = summarise(records)
    out = {"n": len({r["case"] for r in records}), "rows": rows, "paper": robustness.micro_averages(records), "seconds_per_edit": seconds}
    out["perplexity"] = held_out(lm, stacks[:1])[0]
    write(f"{FOLDER}/{what}-{slug(label)}", {**out, **more, "cases": means(records)})
    shown = {r["metric"]: round(r["value"], 3) for r in rows if r["protocol"] == "starts" and r["metric"] in COLUMNS}
    print(label, f"{seconds:.2f} s", out["perplexity"], shown, flush=True)


def means(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record a case and kind, of the means over its probes (what should stay is one kind): what paired differences need."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        grouped.setdefault((r["case"], "neighbour" if r["kind"] in ("neighbour", "unrelated") else r["kind"]), []).append(r)
    fields = ("tf_after", "tf_agree", "starts_after", "answer_agree", "gen_match_after", "gen_agree")
    return [
        {"method": own[0]["method"], "case": case, "kind": kind, **{f: round(sum(float(r[f]) for r in own) / len(own), 6) for f in fields}}
        for (case, kind), own in grouped.items()
    ]


def suite(lm: LM, n: int, only: Sequence[str]) -> None:
    """A method's patches serve twice: alone, and with REP's adaptors."""
    chosen, answers = widened(lm, n), AnswerCache()
    wanted = [c.request for c in chosen]
    for label in only or (*FAMILY, *OTHERS):
        edit = editor(lm, label)
        began = time.perf_counter()
        patches = edit.edit_each(lm, wanted)
        spent = (time.perf_counter() - began) / n
        stacks: list[Any] = [(p,) for p in patches]
        keep("suite", label, lm, score(lm, chosen, stacks, label, None, answers), stacks, spent)
        if label not in FAMILY:
            continue
        name, began = f"rep-{label}", time.perf_counter()
        adapted = editor(lm, "rep", wraps=label).adapt(lm, patches)
        spent += (time.perf_counter() - began) / n
        stacks = [(p,) for p in adapted]
        keep("suite", name, lm, score(lm, chosen, stacks, name, None, answers), stacks, spent)


def ablation(lm: LM, n: int, only: Sequence[str]) -> None:
    chosen, answers = widened(lm, n, (*LEFT_OUT, "long_unseen")), AnswerCache()
    patches = editor(lm, "rome").edit_each(lm, [c.request for c in chosen])
    for label in only or ABLATION:
        began = time.perf_counter()
        adapted = editor(lm, "rep", **ABLATION[label]).adapt(lm, patches)
        stacks: list[Any] = [(p,) for p in adapted]
        spent = (time.perf_counter() - began) / n
        keep("ablation", label, lm, score(lm, chosen, stacks, label, None, answers), stacks, spent)


def scope(lm: LM, n: int, only: Sequence[str]) -> None:
    """MEMIT in joint patches of 10 and one of 100, ROME one after another to T = 30: without REP, with a set an edit, with a shared one."""
    chosen, answers = widened(lm, n, (*LEFT_OUT, "long_unseen")), AnswerCache()
    plain = {
        "none": lambda m: editor(lm, m),
        "edit": lambda m: editor(lm, "rep", wraps=m),
        "shared": lambda m: editor(lm, "rep", wraps=m, scope="shared"),
    }
    for kind, make in plain.items():
        for size in (10, n):
            label = f"memit {size} {kind}"
            if only and label not in only:
                continue
            began = time.perf_counter()
            stack, records = run.batched(lm, make("memit"), chosen, size, None, answers, label)
            keep("scope", label, lm, records, [stack], (time.perf_counter() - began) / n, numbers=sum(p.parameters for p in stack))
        label, few = f"rome continual {kind}", chosen[: min(n, 30)]
        if only and label not in only:
            continue
        began = time.perf_counter()
        stack, at, _ = run.continual(lm, make("rome"), few, [len(few)], None, answers, label)
        spent = (time.perf_counter() - began) / len(few)
        keep("scope", label, lm, at[len(few)], [stack], spent, numbers=sum(p.parameters for p in stack))


def tables() -> None:
    import json

    for what in ("suite", "ablation", "scope"):
        found = {p.stem.removeprefix(f"{what}-"): json.loads(p.read_text()) for p in sorted((OUT / FOLDER).glob(f"{what}-*.json"))}
        if not found:
            continue
        text = ""
        for protocol in ("starts", "generated", "teacher_forced"):
            rows = []
            for label, f in found.items():
                at = {r["metric"]: r for r in f["rows"] if r["protocol"] == protocol}
                cells = [f"{at[c]['value']:.3f} [{at[c]['low']:.2f}, {at[c]['high']:.2f}]" if c in at else "–" for c in COLUMNS]
                rows.append([label, *cells, f"{f['perplexity']:.0f}", f"{f['seconds_per_edit']:.2f}"])
            text += f"\n{protocol}\n\n" + lines(["method", *COLUMNS, "perplexity", "s an edit"], rows)
        if what == "suite":
            text += "\nREP's own averages (over items, teacher-forced exact match)\n\n"
            names = list(dict.fromkeys(r["score"] for f in found.values() for r in f["paper"]))
            values = {label: {r["score"]: r["value"] for r in f["paper"]} for label, f in found.items()}
            text += lines(["method", *names], [[label, *(f"{v[s]:.3f}" if s in v else "–" for s in names)] for label, v in values.items()])
            text += "\nREP against the method without it, paired over cases (free text)\n\n" + _differences(found)
        (OUT / FOLDER / f"{what}.md").write_text(text)


def _differences(found: dict[str, Any]) -> str:
    rows = []
    for label in FAMILY:
        if label in found and f"rep-{label}" in found:
            cells = []
            for column in COLUMNS:
                one, two = found[f"rep-{label}"]["cases"], found[label]["cases"]
                d = difference(_full(one), _full(two), column, "starts" if "starts_after" in one[0] else "generated")
                cells.append(f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]")
            rows.append([label, *cells])
    return lines(["method", *COLUMNS], rows)


def _full(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"known": True, "target": "", **r} for r in records]


def main() -> None:
    parser = arguments(__doc__, ["suite", "ablation", "scope", "tables"], 100)
    parser.add_argument("--only", metavar="LABEL,LABEL", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "tables":
        tables()
        return
    only = [part for part in args.only.split(";" if ";" in args.only else ",") if part]
    globals()[args.what](errata.load("almanac"), args.n, only)


if __name__ == "__main__":
    main()
