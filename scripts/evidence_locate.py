"""The figures of the locate-then-edit family in docs/results, each from one command (statistics come from the text the almanac was trained on).

    python scripts/evidence_locate.py sweep                       # dev: block, rate, clamp, λ around the almanac's presets  -> locate-sweep.json
    python scripts/evidence_locate.py single                      # test: every method, single edits                         -> locate-single.*
    python scripts/evidence_locate.py batch                       # test: 10, 100, 1,000 edits in one patch                  -> locate-batch.*
    python scripts/evidence_locate.py ridge                       # dev: how AlphaEdit's change grows, T = 250                 -> locate-ridge.json
    python scripts/evidence_locate.py continual --only rome       # test: T = 1, 10, 100, 1,000 in one pass                  -> locate-continual-*

Hyper-parameters are chosen on ``dev`` only.  Each figure comes teacher-forced, generated and as likelihoods; beside them fluency (GE), consistency (RS) and
perplexity on held-out text, before and after.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from evidence import OUT, arguments, cases, editor, held_out, rows_of, table, there, write

import errata
from errata import registry, run
from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.weights import delta_weight, merge
from errata.report import curves, page, tables
from errata.score import generation
from errata.score.evaluator import AnswerCache, score
from errata.score.match import exact_match

SHOWN = ("reliability", "generality", "portability", "locality_agreement", "ES", "PS", "NS", "S", "GE", "RS")
SINGLE = ("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit", "baft")
JOINT = ("memit", "emmet", "alphaedit")
CONTINUAL = ("rome", "memit", "alphaedit")  # BaFT's row comes from `evidence.py continual`
FLUENT = 100  # cases whose texts are generated


def show(label: str, rows: Sequence[dict[str, Any]], *more: Any) -> None:
    found = {(r["metric"], r["protocol"]): r["value"] for r in rows}
    print(label, *more, {f"{m} {p[:3]}": round(v, 3) for (m, p), v in found.items()}, flush=True)


def fluency(lm: LM, chosen: Sequence[Any], stacks: Sequence[Stack], label: str, texts: dict[Any, str]) -> list[dict[str, Any]]:
    """GE and RS records of the first `FLUENT` cases."""
    source = registry.get("benchmark", "almanac")()
    return generation.score(lm, chosen[:FLUENT], stacks[:FLUENT], label, source, texts=texts)


def single(lm: LM, n: int, only: str | None) -> None:
    chosen, answers, texts, out = cases("test", n), AnswerCache(), {}, {"n": n, "rows": [], "seconds_per_edit": {}, "perplexity": {}}
    every: dict[str, list[dict[str, Any]]] = {}
    out["perplexity"]["unedited"] = held_out(lm, [()])
    for label in [only] if only else SINGLE:
        edit = editor(lm, label)
        began = time.perf_counter()
        patches = edit.edit_each(lm, [c.request for c in chosen])
        out["seconds_per_edit"][label] = (time.perf_counter() - began) / n
        records = score(lm, chosen, [(p,) for p in patches], label, None, answers)
        every[label] = records
        records = [*records, *fluency(lm, chosen, [(p,) for p in patches], label, texts)]
        rows = rows_of(records, SHOWN)
        out["rows"] += rows
        out["perplexity"][label] = held_out(lm, [(p,) for p in patches[:20]])
        show(label, rows, f"{out['seconds_per_edit'][label]:.3f} s", out["perplexity"][label][:3])
    if only:  # one row made again, in the table of all
        old = json.loads((OUT / "locate-single.json").read_text())
        out["rows"] = [r for r in old["rows"] if r["method"] != only] + out["rows"]
        out["seconds_per_edit"], out["perplexity"] = ({**old[k], **out[k]} for k in ("seconds_per_edit", "perplexity"))
    write("locate-single", out)
    (OUT / "locate-single.md").write_text(tables.markdown(out["rows"]) + "\n")
    shown = [r for label in ("rome", "memit", "alphaedit") if label in every for r in every[label]]
    rows = [r for r in out["rows"] if r["method"] in ("rome", "memit", "alphaedit") and r["protocol"] != "sampled"]
    if shown and not only:
        title = "Locate-then-edit, single editing, almanac test"
        (OUT / "locate-single.html").write_text(page.page(title, rows, shown, {"cases": n}, max_cases=40))


def batch(lm: LM, n: int, only: str | None) -> None:
    """One joint patch of each size; scored over all its edits."""
    answers, texts, out = AnswerCache(), {}, {"rows": [], "seconds_per_edit": {}, "perplexity": {"unedited": held_out(lm, [()])}}
    for label in [only] if only else JOINT:
        for size in [s for s in (10, 100, 1000) if s <= n]:
            chosen = cases("test", size)
            began = time.perf_counter()
            stack = (editor(lm, label).edit(lm, [c.request for c in chosen]),)
            seconds = (time.perf_counter() - began) / size
            records = score(lm, chosen, [stack] * size, label, None, answers)
            records += fluency(lm, chosen, [stack] * size, label, texts)
            rows = rows_of(records, SHOWN, T=size)
            out["rows"] += rows
            out["seconds_per_edit"][f"{label} {size}"] = seconds
            out["perplexity"][f"{label} {size}"] = held_out(lm, [stack])
            show(label, rows, size, f"{seconds:.3f} s", out["perplexity"][f"{label} {size}"])
        write(f"locate-batch-{label}", out)
        out = {"rows": [], "seconds_per_edit": {}, "perplexity": {}}
    gathered("locate-batch", JOINT, "edits at once")


def continual(lm: LM, n: int, only: str | None) -> None:
    """One edit after the other in one pass; scored on the final stack at each mark, and right after each edit."""
    marks = [m for m in (1, 10, 100, 1000) if m <= n]
    for label in [only] if only else CONTINUAL:
        chosen, answers, texts = cases("test", n), AnswerCache(), {}
        stacks: dict[int, Stack] = {}
        began = time.perf_counter()
        progress: Callable[[str, int, int], None] = lambda stage, done, total, label=label: (  # noqa: E731
            print(f"  {label} {done}/{total}", flush=True) if stage == "editing" and done % 100 == 0 else None
        )
        _, at, immediate = run.continual(lm, editor(lm, label), chosen, marks, progress, answers, label, stacks)
        rows = []
        for mark, records in at.items():
            more = fluency(lm, chosen[:mark], [stacks[mark]] * mark, label, texts)
            rows += rows_of([*records, *more], SHOWN, T=mark)
        out = {"n": n, "rows": rows, "immediate": rows_of(immediate, SHOWN, T="right after"), "seconds": time.perf_counter() - began}
        out["perplexity"] = {"unedited": held_out(lm, [()]), **{str(m): held_out(lm, [stacks[m]]) for m in marks}}
        show(label, [r for r in rows if r["T"] == marks[-1]], out["perplexity"], f"{out['seconds']:.0f} s")
        write(f"locate-continual-{label}", out)
    gathered("locate-continual", CONTINUAL, "T")


def ridge(lm: LM, n: int, only: str | None) -> None:
    """Why AlphaEdit gives way after some hundred edits: the growth of its change with L₂ and with the share that counts as null space; dev."""
    chosen = cases("dev", n)
    out: list[dict[str, Any]] = []
    for values in ({}, {"l2": 1000.0}, {"share": 0.4}, {"history": False}):
        edit, stack, path = editor(lm, "alphaedit", **values), (), []
        for i, case in enumerate(chosen, 1):
            stack = (*stack, edit.edit(lm, [case.request], on=stack))
            if i % 50 == 0:
                merged = merge(stack)
                said = lm.generate([c.request.prompt for c in chosen[:i]], stacks=[(merged,)])
                right = [exact_match(text, c.request.target) for text, c in zip(said, chosen, strict=False)]
                size = sum(float(delta_weight(op).norm()) for op in merged.ops)
                point = {
                    "T": i,
                    "right": sum(right) / i,
                    "last 50 right": sum(right[-50:]) / 50,
                    "perplexity": held_out(lm, [(merged,)])[0],
                    "change": size,
                }
                path.append(point)
        out.append({"settings": values, "path": path})
        print(values, path, flush=True)
        write("locate-ridge", {"n": n, "runs": out})


def gathered(name: str, labels: Sequence[str], by: str) -> None:
    """The tables and the plot of what is there: each label is on its own file, so that they can run side by side."""
    found = there([*(f"{name}-{label}" for label in labels), *(["continual-baft"] if by == "T" else [])])
    rows = [row for f in found for row in [*f["rows"], *({"T": "right after", **r} for r in f.get("immediate", ()))]]
    (OUT / f"{name}.md").write_text(table(rows, "T", SHOWN, by))
    drawn = [r for r in rows if r["T"] != "right after" and r["protocol"] == "teacher_forced" and r["metric"] in SHOWN[:2] + SHOWN[3:4]]
    curves.retention(drawn, OUT / f"{name}.png")


def sweep(lm: LM, n: int, only: str | None) -> None:
    """One knob at a time around the almanac's presets, on dev; single edits for ROME, one joint patch for the others."""
    chosen, answers, rows = cases("dev", n), AnswerCache(), []
    grid: list[tuple[str, str, dict[str, Any], float]] = [("rome", "block", {"layers": [b]}, float(b)) for b in range(4)]
    grid += [("rome", "v_lr", {"v_lr": x}, x) for x in (5.0, 20.0, 40.0)] + [("rome", "clamp", {"clamp": x}, x) for x in (1.0, 4.0)]
    grid += [("memit", "clamp", {"clamp": x}, x) for x in (0.75, 1.5, 4.0)]
    grid += [("memit", "blocks", {"layers": ls}, float(i)) for i, ls in enumerate(([0], [0, 1, 2], [2, 3]))]
    grid += [("alphaedit", "l2", {"l2": x}, x) for x in (10.0, 100.0, 1000.0)]
    grid += [("alphaedit", "share", {"share": x}, x) for x in (0.5, 0.7, 0.9)]
    grid += [("memit", "mom2_weight", {"mom2_weight": x}, x) for x in (20.0, 100.0, 500.0)]
    grid += [("memit", "text", {"stats": t}, float(i)) for i, t in enumerate(("almanac", "bundled"))]
    grid += [("emmet", "block", {"layers": [b]}, float(b)) for b in (0, 2)]
    for method, knob, values, x in grid:
        if only and method != only:
            continue
        edit = editor(lm, method, **values)
        requests = [c.request for c in chosen]
        stacks = [(p,) for p in edit.edit_each(lm, requests)] if method == "rome" else [(edit.edit(lm, requests),)] * n
        found = rows_of(score(lm, chosen, stacks, method, None, answers), SHOWN, knob=knob, x=x, setting=values)
        rows += found
        show(method, found, values)
        write(f"locate-sweep{'-' + only if only else ''}", {"n": n, "rows": rows})
    for knob in ("clamp", "l2"):
        drawn = [
            {**r, "setting": knob} for r in rows if r["knob"] == knob and r["protocol"] == "teacher_forced" and r["metric"] != "portability"
        ]
        curves.sweep(drawn, OUT / f"locate-sweep-{knob}.png")


def main() -> None:
    parser = arguments(__doc__, ["sweep", "single", "batch", "continual", "ridge"])
    parser.add_argument("--only", help="one method, so that several can run side by side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    default = {"sweep": 24, "single": 150, "batch": 1000, "continual": 1000, "ridge": 250}[args.what]
    globals()[args.what](errata.load("almanac"), args.n or default, args.only)


if __name__ == "__main__":
    main()
