"""What the numbers mean: the first cases of a run as answers, every method's, before and after.

    python scripts/answers.py RUN [RUN …] --cases 10 --out docs/results/answers.md

RUN is a folder of `errata run` with single edits; of several of one model, what is in all of them.  A case is shown by its edited prompt, its first rephrasing and its first neighbour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN = {"rewrite": "edited prompt", "rephrase": "in other words", "neighbour": "a neighbour"}
LONGEST = 48  # characters of an answer

_ABOUT = (
    "What the numbers mean, in words: each edit alone, the free answer cut at its first sentence. **Bold**: as it should be. An answer begins\n"
    "with what was wanted; a neighbour's keeps its first word. Nothing was chosen: these are the first cases of the run."
)

Record = Mapping[str, Any]


def short(text: str) -> str:
    """An answer in a cell."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return (plain if len(plain) <= LONGEST else plain[: LONGEST - 1] + "…") or "(nothing)"


def ending(prompt: str) -> str:
    """A prompt in a cell: its end, where the question is."""
    plain = " ".join(prompt.split()).replace("|", "\\|")
    return plain if len(plain) <= 2 * LONGEST else "…" + plain[-2 * LONGEST + 1 :]


def first_probes(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """{case: {kind: its first record}}, of the kinds that are shown, in the order of the run."""
    out: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["kind"] in SHOWN:
            out.setdefault(record["case"], {}).setdefault(record["kind"], record)
    return out


def read(folder: Path) -> tuple[str, dict[str, dict[str, dict[str, Record]]]]:
    """(model, {method: {case: {kind: record}}}) of a run; cells that are not complete are left out."""
    model, methods = "", {}
    for path in sorted((folder / "cells").glob("*/records.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if records:
            cell = json.loads((path.parent / "cell.json").read_text(encoding="utf-8"))["cell"]
            model = cell["model"]["name"]
            methods[str(records[0]["method"])] = first_probes(records)
    return model, methods


def page(runs: Sequence[tuple[str, Mapping[str, Mapping[str, Mapping[str, Record]]]]], cases: int) -> str:
    """All of it in Markdown."""
    lines = ["# Ten answers of every method", "", _ABOUT, ""]
    for model, methods in runs:
        chosen = list(next(iter(methods.values())))[:cases]
        lines += [f"## {model}", "", "Before any edit:", "", "| | prompt | wanted | the model says |", "|---|---|---|---|"]
        first = next(iter(methods.values()))
        for n, case in enumerate(chosen, 1):
            for kind, what in SHOWN.items():
                if kind in first[case]:
                    r = first[case][kind]
                    wanted = r["target"] if kind != "neighbour" else "as before"
                    lines.append(f"| {n} {what} | {ending(r['prompt'])} | {wanted} | {short(r['gen_before'])} |")
        for method, own in methods.items():
            lines += ["", f"### {model}: {method}", "", f"| | {' | '.join(SHOWN.values())} |", "|---|---|---|---|"]
            lines += [row(n, own[case]) for n, case in enumerate(chosen, 1) if case in own]
        lines.append("")
    return "\n".join(lines)


def row(number: int, own: Mapping[str, Record]) -> str:
    """One case under one method."""
    cells = []
    for kind in SHOWN:
        if kind not in own:
            cells.append("–")
            continue
        r = own[kind]
        good = r["first_word_agree"] if kind == "neighbour" else r["starts_after"]
        cells.append(f"**{short(r['gen_after'])}**" if good else short(r["gen_after"]))
    return f"| {number} | {' | '.join(cells)} |"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", type=Path)
    arguments.add_argument("--cases", type=int, default=10)
    arguments.add_argument("--out", type=Path, required=True)
    args = arguments.parse_args()
    found: dict[str, dict[str, dict[str, dict[str, Record]]]] = {}
    for model, methods in map(read, args.runs):
        found.setdefault(model, {}).update(methods)
    args.out.write_text(page([(m, own) for m, own in found.items() if own], args.cases), encoding="utf-8")


if __name__ == "__main__":
    main()
