"""Every method of the project on the almanac, in one table a scenario (docs/results/editors).

    python scripts/evidence_editors.py single [--only LABEL]        # 200 test cases, each alone
    python scripts/evidence_editors.py batched [--only LABEL]       # joint edits of 10 and of 50 on a growing stack, 200 test cases
    python scripts/evidence_editors.py continual [--only LABEL]     # T = 1, 10, 100, 1,000 in one pass
    python scripts/evidence_editors.py latency                      # decoding under one patch of each method against the base, all in turn
    python scripts/evidence_editors.py runs FOLDER…                 # take continual cells of `errata run` (docs/results/grid) that go further
    python scripts/evidence_editors.py tables                       # the tables and plots of what is there

Each label is kept in its own file, so that several can run side by side.  Hyper-parameters are the almanac presets, chosen on ``dev``.
Teacher-forced, generated, likelihood and free tokens (the protocol GRACE was published with) are tables of their own; with them
go seconds an edit, numbers and bytes of a saved patch, and decoding time against the base's.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from docs_results import continual_file, slug
from evidence import OUT, arguments, cases, editor, held_out, rows_of, table, write

import errata
from errata import run
from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import Patch
from errata.report import curves
from errata.report.tables import headline
from errata.score.cost import latency, size_on_disk
from errata.score.evaluator import AnswerCache, score

SHOWN = ("reliability", "generality", "portability", "locality_agreement", "ES", "PS", "NS", "S")
EDITORS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "ice": ("ice", {}),
    "ike": ("ike", {}),
    "retrieval": ("retrieval", {}),
    "ft-l": ("ft-l", {}),
    "ft-m": ("ft-m", {}),
    "loc-ft": ("loc-ft", {}),
    "lora": ("lora", {}),
    "adalora": ("adalora", {}),
    "grace": ("grace", {}),
    "melo": ("melo", {}),
    "wise": ("wise", {}),
    "wise-light": ("wise-light", {}),
    "rome": ("rome", {}),
    "r-rome": ("r-rome", {}),
    "memit": ("memit", {}),
    "pmet": ("pmet", {}),
    "emmet": ("emmet", {}),
    "alphaedit": ("alphaedit", {}),
    "reft": ("reft", {}),
    "baft": ("baft", {}),
    "rep on rome": ("rep", {"wraps": "rome"}),
}
ONE_BY_ONE: dict[str, dict[str, Any]] = {"melo": {"blocks": 1000}}  # continual: a block an edit, and the published store holds 350
MARKS = (1, 10, 100, 1000)
SIZES = (10, 50)
TIMED = 8  # times the edited prompt is decoded in one turn
FOLDER = "editors"
DRAWN = ("ft-m", "adalora", "grace", "melo", "wise", "memit", "reft", "baft")  # a plot of twenty lines says nothing


def made(lm: LM, label: str, **more: Any) -> Any:
    method, values = EDITORS[label]
    return editor(lm, method, **{**values, **more})


def sizes(patches: Sequence[Patch]) -> dict[str, Any]:
    """Of the patches as saved, means."""
    few = patches[:20]
    return {"parameters": statistics.mean(p.parameters for p in few), "bytes": statistics.mean(size_on_disk(p) for p in few)}


def keep(scenario: str, label: str, payload: dict[str, Any]) -> None:
    (OUT / FOLDER).mkdir(parents=True, exist_ok=True)
    write(f"{FOLDER}/{scenario}-{slug(label)}", payload)


def show(label: str, rows: Sequence[dict[str, Any]], *more: Any) -> None:
    found = {f"{r['metric']} {r['protocol'][:3]}": round(r["value"], 3) for r in rows if r["protocol"] != "likelihood"}
    print(label, *more, found, flush=True)


def single(lm: LM, n: int, label: str, answers: AnswerCache) -> None:
    chosen, edit = cases("test", n), made(lm, label)
    if hasattr(edit, "prepare"):
        edit.prepare(lm)
    began = time.perf_counter()
    patches = edit.edit_each(lm, [c.request for c in chosen])
    seconds = (time.perf_counter() - began) / n
    alone = []
    for case in chosen[:5]:
        began = time.perf_counter()
        edit.edit(lm, [case.request])
        alone.append(time.perf_counter() - began)
    stacks: list[Stack] = [(p,) for p in patches]
    rows = rows_of(score(lm, chosen, stacks, label, None, answers), SHOWN, method=label)
    out = {"n": n, "rows": rows, "seconds_per_edit": seconds, "seconds_alone": statistics.median(alone), "threads": torch.get_num_threads()}
    out |= sizes(patches)
    out["perplexity"] = statistics.mean(held_out(lm, stacks[:10]))
    keep("single", label, out)
    show(label, rows, f"{seconds:.3f} s, alone {out['seconds_alone']:.3f} s, {out['bytes']:.0f} bytes")


def batched(lm: LM, n: int, label: str, answers: AnswerCache) -> None:
    chosen, out = cases("test", n), {"n": n, "rows": [], "seconds_per_edit": {}, "perplexity": {}}
    for size in SIZES:
        edit, ends = made(lm, label), [0.0]
        if hasattr(edit, "prepare"):
            edit.prepare(lm)
        began = time.perf_counter()
        progress = lambda stage, done, total, ends=ends, began=began: (  # noqa: E731
            ends.append(time.perf_counter() - began) if stage == "editing" else None
        )
        stack, records = run.batched(lm, edit, chosen, size, progress, answers, label)
        rows = rows_of(records, SHOWN, method=label, T=size)
        out["rows"] += rows
        out["seconds_per_edit"][size] = ends[-1] / n
        out["perplexity"][size] = held_out(lm, [stack])[0]
        show(label, rows, size, f"{ends[-1] / n:.3f} s", out["perplexity"][size])
    keep("batched", label, out)


def continual(lm: LM, n: int, label: str, answers: AnswerCache) -> None:
    chosen, marks = cases("test", n), [m for m in MARKS if m <= n]
    stacks: dict[int, Stack] = {}
    began = time.perf_counter()
    progress: Callable[[str, int, int], None] = lambda stage, done, total: (  # noqa: E731
        print(f"  {label} {done}/{total} {time.perf_counter() - began:.0f} s", flush=True)
        if stage == "editing" and done % 100 == 0
        else None
    )
    stack, at, immediate = run.continual(lm, made(lm, label, **ONE_BY_ONE.get(label, {})), chosen, marks, progress, answers, label, stacks)
    rows = [row for mark, records in at.items() for row in rows_of(records, SHOWN, method=label, T=mark)]
    out = {
        "n": n,
        "rows": rows,
        "immediate": rows_of(immediate, SHOWN, method=label, T="right after"),
        "seconds": time.perf_counter() - began,
    }
    out |= sizes(stack[-1:])
    out["patches"] = len(stack)
    out["perplexity"] = {str(m): held_out(lm, [stacks[m]])[0] for m in marks}
    keep("continual", label, out)
    show(label, [r for r in rows if r["T"] == marks[-1]], f"{out['seconds']:.0f} s", out["perplexity"])


def runs(folders: Sequence[Path]) -> None:
    """Continual cells of `errata run` on the same cases, each where it goes to a larger T than what is there, or as far as what another script made."""
    for path in sorted(cell for folder in folders for cell in folder.glob("cells/*/summary.json")):
        found, cost = json.loads(path.read_text()), json.loads((path.parent / "cost.json").read_text())
        label = found["cell"]["method"]["label"]
        there = read("continual").get(label, {"n": 0})["n"] - (not (OUT / continual_file(label)).is_relative_to(OUT / FOLDER))
        if found["cell"]["scenario"]["kind"] != "continual" or there >= found["n"]:
            continue
        shown = lambda rows: [{k: v for k, v in row.items() if k != "version"} for row in rows if row["metric"] in SHOWN]  # noqa: E731
        out = {"n": found["n"], "rows": shown(found["retention"]), "from": f"errata run, {found['id']}"}
        out["immediate"] = [{**row, "T": "right after"} for row in shown(found["right_after"])]
        out |= {"seconds": sum(cost["seconds"].values()), "seconds_by_work": cost["seconds"]}
        out |= {"parameters": cost["parameters"], "bytes": cost["patch_bytes"]}
        out["perplexity"] = {str(h["T"]): round(h["perplexity"], 2) for h in found["health"]}
        keep("continual", label, out)
        print(label, found["n"], found["id"])


def speeds(lm: LM, n: int, labels: Sequence[str]) -> None:
    """Decoding the edited prompt ``TIMED`` times, one row at a time, under one patch of each method; ``n`` turns."""
    chosen = cases("test", 1)
    stacks = [(made(lm, label).edit(lm, [chosen[0].request]),) for label in labels]
    found = latency(lm, stacks, [chosen[0].request.prompt] * TIMED, repeat=n)
    rows = {label: {"seconds_a_token": seconds, "ratio": ratio} for label, (seconds, ratio) in zip(labels, found, strict=True)}
    keep("latency", "all", {"repeat": n, "threads": torch.get_num_threads(), "rows": rows})
    print(json.dumps(rows, indent=1))


def read(scenario: str) -> dict[str, dict[str, Any]]:
    """What is there of a scenario, in the order of `EDITORS`."""
    out = {}
    for label in EDITORS:
        path = OUT / (continual_file(label) if scenario == "continual" else f"{FOLDER}/{scenario}-{slug(label)}.json")
        if path.exists():
            out[label] = json.loads(path.read_text())
    return out


def lines(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(cells) + "\n"


def costs(found: dict[str, dict[str, Any]]) -> str:
    """What `single` and `latency` measured beside the scores."""
    path = OUT / FOLDER / "latency-all.json"
    speed = json.loads(path.read_text())["rows"] if path.exists() else {}
    heads = ["method", "s an edit (200 at once)", "s an edit (alone)", "numbers", "bytes on disk", "decoding against base", "perplexity"]
    rows = [
        [label, f"{f['seconds_per_edit']:.3f}", f"{f['seconds_alone']:.3f}", f"{f['parameters']:,.0f}", f"{f['bytes']:,.0f}",
         f"{speed[label]['ratio']:.2f}" if label in speed else "–", f"{f['perplexity']:.0f}"]
        for label, f in found.items()
    ]  # fmt: skip
    return "\nCost of a single edit\n\n" + lines(heads, rows)


def perplexities(found: dict[str, dict[str, Any]], heading: str) -> str:
    have = {label: {str(k): v for k, v in f["perplexity"].items()} for label, f in found.items() if isinstance(f.get("perplexity"), dict)}
    at = sorted({k for f in have.values() for k in f if k.isdigit()}, key=int)
    first = lambda v: v[0] if isinstance(v, list) else v  # noqa: E731
    rows = [[label, *(f"{first(f[k]):,.0f}" if k in f else "–" for k in at)] for label, f in have.items()]
    return f"\nPerplexity on held-out text\n\n{lines(['method', *(f'{heading} {k}' for k in at)], rows)}"


def tables(out: Path) -> None:
    found = read("single")
    rows = [{**r, "T": f["n"]} for f in found.values() for r in f["rows"]]
    (out / "single.md").write_text(table(rows, "T", SHOWN, "cases") + costs(found))
    found = read("batched")
    rows = [r for f in found.values() for r in f["rows"]]
    (out / "batched.md").write_text(table(rows, "T", SHOWN, "edits a patch") + perplexities(found, "by"))
    found = read("continual")
    rows = [r for f in found.values() for r in [*f["rows"], *({**r, "T": "right after"} for r in f.get("immediate", ()))]]
    rows = [r for r in rows if r["metric"] in SHOWN]
    (out / "continual.md").write_text(table(rows, "T", SHOWN) + perplexities(found, "T ="))
    drawn = [r for r in rows if r["method"] in DRAWN and r["T"] != "right after" and r["protocol"] == headline(rows)]
    for metric in ("reliability", "locality_agreement"):  # one a plot: eight methods are enough lines
        curves.retention([r for r in drawn if r["metric"] == metric], out / f"continual-{metric.partition('_')[0]}.png")


def main() -> None:
    parser = arguments(__doc__, ["single", "batched", "continual", "latency", "runs", "tables"])
    parser.add_argument("folders", nargs="*", type=Path, help="of `runs`")
    parser.add_argument("--only", metavar="LABEL,LABEL", help=f"of {', '.join(EDITORS)}")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what in ("tables", "runs"):
        tables(OUT / FOLDER) if args.what == "tables" else runs(args.folders)
        return
    lm, answers = errata.load("almanac"), AnswerCache(free_tokens=True)
    labels = args.only.split(",") if args.only else list(EDITORS)
    n = args.n or {"single": 200, "batched": 200, "continual": 1000, "latency": 7}[args.what]
    if args.what == "latency":
        speeds(lm, n, labels)
        return
    for label in labels:
        globals()[args.what](lm, n, label, answers)


if __name__ == "__main__":
    main()
