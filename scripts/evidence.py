"""The figures in docs/results: quality of the methods on the almanac, each from one command.

    python scripts/evidence.py sweep        # dev: learning rate, rank, layers of BaFT and ReFT      -> sweep.json, sweep-*.png
    python scripts/evidence.py single       # test: BaFT beside ReFT and two ablations, single edits  -> single.json/.md/.html
    python scripts/evidence.py continual    # test: T = 1, 10, 100, 1000 in one pass                  -> continual-*.json, continual.md/.png
    python scripts/evidence.py ablation     # test: the paper's Table 4, T = 100                      -> ablation.json/.md

Hyper-parameters are chosen on ``dev`` only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from docs_results import RESULTS as OUT

import errata
from errata import registry, run
from errata.core.bank import Stack
from errata.core.model import LM
from errata.report import curves, page, tables
from errata.request import Case
from errata.score.evaluator import AnswerCache
from errata.score.metrics import difference, summarise
from errata.score.perplexity import perplexity
from errata.text.corpora import bundled

SHOWN = ("reliability", "generality", "portability", "locality_agreement", "locality_correct")
TOKENS = 8_000  # of held-out text a stack
PLAIN = {"weight_decay": 0.0}  # of which the papers say nothing; the almanac's presets have one (docs/results, "Weight decay")
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # rows of the paper's Table 4
    "reft": ("reft", PLAIN),
    "ss-w": ("baft", {**PLAIN, "gate": "subspace", "balance": False, "locality": False}),
    "ba-w": ("baft", {**PLAIN, "locality": False}),
    "ss-w & lr": ("baft", {**PLAIN, "gate": "subspace", "balance": False}),
    "baft": ("baft", PLAIN),
    "baft, no balance": ("baft", {**PLAIN, "balance": False}),
}
# BaFT's total loss keeps it training after the answer is written; ReFT without early stop takes as many steps
SINGLE = {**{k: ABLATIONS[k] for k in ("baft", "reft", "ba-w", "ss-w")}, "reft, 40 steps": ("reft", {**PLAIN, "stop": 0.0})}


def editor(lm: LM, name: str, **settings: Any) -> Any:
    return registry.get("method", name).for_model(lm, **settings)


def cases(split: str, n: int) -> list[Case]:
    return list(registry.get("benchmark", "almanac")().load(split, n))


def rows_of(records: Sequence[dict[str, Any]], shown: Sequence[str] = SHOWN, **more: Any) -> list[dict[str, Any]]:
    return [{**row, **more} for row in summarise(records) if row["metric"] in shown]


def held_out(lm: LM, stacks: Sequence[Stack]) -> list[float]:
    """Perplexity of each stack on text the almanac was not trained on."""
    return [round(p.value, 2) for p in perplexity(lm, bundled("heldout"), stacks=stacks, tokens=TOKENS)]


def there(names: Iterable[str]) -> list[dict[str, Any]]:
    """What `write` left under these names, as far as it is there."""
    paths = [OUT / f"{name}.json" for name in names]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def arguments(about: str | None, what: Sequence[str], n: int | None = None) -> argparse.ArgumentParser:
    """The command line that the evidence scripts share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    parser.add_argument("--n", type=int, default=n)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def write(name: str, payload: dict[str, Any]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")


def show(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(f"  {row['metric']:20} {row['protocol']:15} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", flush=True)


def sweep(lm: LM, n: int) -> None:
    """One knob at a time around the preset, on dev."""
    chosen, answers, rows = cases("dev", n), AnswerCache(), []
    grid: list[tuple[str, str, dict[str, Any], float]] = []
    for method in ("baft", "reft"):
        grid += [(method, "lr", {"lr": lr}, lr) for lr in (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)]
        grid += [(method, "rank", {"rank": r}, r) for r in (1, 2, 4, 12, 32)]
        for i, layers in enumerate(([2, 5, 6, 7], [2, 5], [5, 6, 7], [2], [5], [7])):
            grid.append((method, "layers " + ",".join(map(str, layers)), {"layers": layers}, float(i)))
    for method, setting, values, x in grid:
        _, records = run.single(lm, editor(lm, method, **{**PLAIN, **values}), chosen, answers=answers)
        found = rows_of(records, setting=setting, x=x)
        rows += found
        print(method, values, {r["metric"]: round(r["value"], 3) for r in found if r["protocol"] == "teacher_forced"}, flush=True)
    write("sweep", {"n": n, "rows": rows})
    plots(lm, n)


def plots(lm: LM, n: int) -> None:
    """The sweep's curves again, from sweep.json."""
    rows = json.loads((OUT / "sweep.json").read_text())["rows"]
    for knob in ("lr", "rank"):
        curves.sweep([r for r in rows if r["setting"] == knob and r["protocol"] == "teacher_forced"], OUT / f"sweep-{knob}.png")


def single(lm: LM, n: int) -> None:
    chosen, answers, records, seconds = cases("test", n), AnswerCache(), {}, {}
    for label, (method, values) in SINGLE.items():
        began = time.perf_counter()
        edit = editor(lm, method, **values)
        edit.edit_each(lm, [c.request for c in chosen])
        seconds[label] = (time.perf_counter() - began) / n
        _, records[label] = run.single(lm, edit, chosen, answers=answers, label=label)
        print(label, f"{seconds[label]:.3f} s an edit", flush=True)
        show(rows_of(records[label]))
    rows = [row for own in records.values() for row in rows_of(own)]
    gaps = {
        f"{metric} {protocol}": difference(records["baft"], records["reft"], metric, protocol)
        for metric in SHOWN for protocol in ("starts", "generated", "teacher_forced")
    }  # fmt: skip
    write("single", {"n": n, "seconds_per_edit": seconds, "rows": rows, "baft_minus_reft": gaps})
    for name, gap in gaps.items():
        print("baft - reft", name, gap)
    (OUT / "single.md").write_text(tables.markdown(rows) + "\n")
    every = [r for own in (records["baft"], records["reft"]) for r in own]
    shown = [r for r in rows if r["method"] in ("baft", "reft")]
    (OUT / "single.html").write_text(page.page("Single editing, almanac test", shown, every, {"cases": n}, max_cases=60))


def _continual(lm: LM, chosen: list[Case], label: str, marks: list[int], answers: AnswerCache) -> dict[str, Any]:
    method, values = ABLATIONS[label]
    values = {**values, "stop_on": "mean"}  # every row stops on the task loss, as ReFT does
    began = time.perf_counter()
    progress: Callable[[str, int, int], None] = lambda stage, done, total: (  # noqa: E731
        print(f"  {label} {stage} {done}/{total}", flush=True) if stage == "editing" and done % 200 == 0 else None
    )
    _, at, immediate = run.continual(lm, editor(lm, method, **values), chosen, marks, progress, answers, label)
    rows = [row for mark, records in at.items() for row in rows_of(records, T=mark)]
    print(label, f"{time.perf_counter() - began:.0f} s", flush=True)
    show([r for r in rows if r["T"] == marks[-1]])
    return {"rows": rows, "immediate": rows_of(immediate), "seconds": time.perf_counter() - began}


def table(rows: Sequence[dict[str, Any]], by: str, metrics: Sequence[str] = SHOWN, heading: str | None = None) -> str:
    """Markdown: a line for each method and ``by``, a column for each metric; one table a protocol."""
    lines = []
    for protocol in dict.fromkeys(r["protocol"] for r in rows):
        shown = [m for m in metrics if any(r["metric"] == m and r["protocol"] == protocol for r in rows)]
        head = f"| method | {heading or by} | " + " | ".join(shown) + " |"
        lines += [f"\n{protocol.replace('_', ' ')}\n", head, "|---" * (2 + len(shown)) + "|"]
        keys = dict.fromkeys((r["method"], r[by]) for r in rows)
        for method, x in keys:
            own = {r["metric"]: r for r in rows if (r["method"], r[by], r["protocol"]) == (method, x, protocol)}
            cells = [f"{own[m]['value']:.3f} [{own[m]['low']:.3f}, {own[m]['high']:.3f}]" if m in own else "–" for m in shown]
            lines.append(f"| {method} | {x} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


CONTINUAL = ("baft", "ba-w", "reft")


def continual(lm: LM, n: int, only: str | None = None) -> None:
    """Each label on its own file, so that they can run side by side (``--only``); the table is made of those that are there."""
    marks = [m for m in (1, 10, 100, 1000) if m <= n]
    for label in [only] if only else CONTINUAL:
        write(f"continual-{label}", {"n": n, "marks": marks, **_continual(lm, cases("test", n), label, marks, AnswerCache())})
    found = there(f"continual-{label}" for label in CONTINUAL)
    rows = [row for f in found for row in f["rows"]]
    immediate = [{**row, "T": "right after"} for f in found for row in f["immediate"]]
    (OUT / "continual.md").write_text(table([*rows, *immediate], "T"))
    curves.retention([r for r in rows if r["protocol"] == "teacher_forced" and r["metric"] != "portability"], OUT / "continual.png")


def ablation(lm: LM, n: int) -> None:
    chosen, answers = cases("test", n), AnswerCache()
    found = {label: _continual(lm, chosen, label, [n], answers) for label in ABLATIONS}
    write("ablation", {"n": n, **found})
    (OUT / "ablation.md").write_text(table([row for f in found.values() for row in f["rows"]], "T"))


def main() -> None:
    parser = arguments(__doc__, ["sweep", "plots", "single", "continual", "ablation"])
    parser.add_argument("--only", choices=CONTINUAL, help="continual: one of the three, to run them side by side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    default = {"sweep": 64, "plots": 0, "single": 300, "continual": 1000, "ablation": 100}[args.what]
    more = {"only": args.only} if args.what == "continual" else {}
    globals()[args.what](errata.load("almanac"), args.n or default, **more)


if __name__ == "__main__":
    main()
