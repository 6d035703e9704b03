"""On how many tokens of other facts' prompts the gates of an edit open: gates that are solved and stay, and gates that train on.

    python scripts/gate_openings.py MODEL ZSRE.json [--n 24] [--out FILE.json]

Edits are n facts of ZsRE from its 400th on, each made alone by BaFT's default; the prompts are those of 16 facts from the 600th on (edited
prompts, rephrasings, portability and unrelated questions).  A token counts for an edit where any of its gates reaches the threshold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import errata
from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.core.model import LM
from errata.core.read import read_activations
from errata.core.tokens import Encoded
from errata.methods.subspace.gating import gate
from errata.request import Case
from errata.score import wanted

FIRST, ASKED, PROMPTS = 400, 600, 16


def states(lm: LM, patch: Any, rows: Sequence[Encoded]) -> list[torch.Tensor]:
    """Of each op of the patch, the states [tokens, d] of all rows where it acts."""
    places = [(i, t) for i, row in enumerate(rows) for t in range(len(row.ids))]
    sites = [op.site for op in patch.ops]
    found = read_activations(lm, [rows[i] for i, _ in places], sites, at=[t for _, t in places])
    return [found[site][1].float() for site in sites]


def measure(lm: LM, cases: Sequence[Case], rows: Sequence[Encoded], train: bool) -> dict[str, Any]:
    """Shares of tokens, and of the edits' own prompts and rephrasings that are answered as wanted."""
    patches = registry.get("method", "baft")(train_gates=train).edit_each(lm, [case.request for case in cases])
    at = states(lm, patches[0], rows)
    opened = 0
    for patch in patches:
        parts = [
            (gate(op.tensors, op.settings["gate"], h) >= op.settings["threshold"]).any(-1) for op, h in zip(patch.ops, at, strict=True)
        ]
        opened += int(torch.stack(parts).any(0).sum())
    asked = [(p.kind, p.prompt, (patch,), str(p.target)) for case, patch in zip(cases, patches, strict=True) for p in case.probes]
    own = [(kind, *rest) for kind, *rest in asked if kind in ("rewrite", "rephrase")]
    answers = wanted.ask(lm, [(prompt, stack, target) for _, prompt, stack, target in own], short=True)  # type: ignore[misc]
    out: dict[str, Any] = {"train_gates": train, "edits": len(patches), "tokens": len(at[0]), "open": opened / len(at[0]) / len(patches)}
    for kind in ("rewrite", "rephrase"):
        found = [a.as_wanted for (k, *_), a in zip(own, answers, strict=True) if k == kind]
        out[kind] = [sum(found), len(found)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = errata.load(args.model)
    every = list(open_benchmark("zsre", args.data, consistent=True).load(None, None, None))
    rows = lm.encode([p.prompt for case in every[ASKED : ASKED + PROMPTS] for p in case.probes])
    found = [measure(lm, every[FIRST : FIRST + args.n], rows, train) for train in (False, True)]
    text = json.dumps({"model": args.model, "rows": found}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
