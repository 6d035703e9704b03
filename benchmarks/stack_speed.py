"""What a stack of gated edits costs: a forward pass of a real model under 1 to 1,000 BaFT edits, as one chain and one edit after another.

    python benchmarks/stack_speed.py MODEL ZSRE.json [--edits 1,10,100,1000] [--out FILE.json]

The first 12 facts of the file's consistent stream are edited; larger stacks hold copies of these edits, each with tensors of its own, so
that nothing is shared.  16 prompts of other facts, one thread, CPU seconds, best of three; logits are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

import errata
from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.core.patch import Op, Patch
from errata.methods.subspace.op import Subspace

FACTS, PROMPTS, REPEAT = 12, 16, 3


def copied(patch: Patch, number: int) -> Patch:
    """Another patch with the same numbers."""
    ops = tuple(Op(op.kind, op.site, {k: t.clone() for k, t in op.tensors.items()}, op.settings) for op in patch.ops)
    first = dataclasses.replace(patch.requests[0], prompt=f"{number} {patch.requests[0].prompt}")
    return dataclasses.replace(patch, requests=(first,), ops=ops)


def measure(lm: Any, stack: tuple[Patch, ...], prompts: list[str]) -> tuple[float, float, torch.Tensor]:
    """(CPU seconds to compile the stack, of a forward pass, its logits)."""
    batch = lm.batch(lm.encode(prompts))
    best, plan, out = float("inf"), None, torch.empty(0)
    began = time.process_time()
    plan = lm.plan([stack], None, len(prompts))
    compiled = time.process_time() - began
    with torch.no_grad():
        for _ in range(REPEAT):
            began = time.process_time()
            with lm.running(plan):
                out = lm.forward(batch.ids, batch.mask, use_cache=False).logits
            best = min(best, time.process_time() - began)
    return compiled, best, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--edits", default="1,10,100,1000")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm = errata.load(args.model)
    every = list(open_benchmark("zsre", args.data, consistent=True).load(None, None, None))
    made = registry.get("method", "baft")().edit_each(lm, [case.request for case in every[:FACTS]])
    prompts = [case.request.prompt for case in every[100 : 100 + PROMPTS]]
    chain_key, rows = Subspace.chain_key, []
    _, bare, _ = measure(lm, (), prompts)
    for count in map(int, args.edits.split(",")):
        stack = tuple(copied(made[i % FACTS], i) for i in range(count))
        found = {}
        for how in ("chain", "one by one"):
            Subspace.chain_key = chain_key if how == "chain" else staticmethod(lambda op: None)  # type: ignore[method-assign, assignment]
            found[how] = measure(lm, stack, prompts)
        gap = float((found["chain"][2] - found["one by one"][2]).abs().max())
        seconds = {how: {"compile": round(c, 4), "forward": round(f, 4)} for how, (c, f, _) in found.items()}
        rows.append({"edits": count, **seconds, "largest difference of a logit": gap})
        print(rows[-1], flush=True)
    document = {"model": args.model, "dtype": str(lm.dtype), "prompts": PROMPTS, "unedited forward": round(bare, 4), "rows": rows}
    print(json.dumps(document, indent=1))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
