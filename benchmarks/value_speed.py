"""Seconds for N value vectors (ROME's δ): one request at a time with full forward passes, against all in one batch through the tail.

    python benchmarks/value_speed.py [--values 100] [--steps 20] [--repeat 2] [--threads 2] [--out FILE.json]
    python benchmarks/value_speed.py --shape llama-2-7b --device cuda --dtype bfloat16 --edits 1,100,1000   # ROME and MEMIT

Prefixes, rows and steps are the same for all, early stop is off.  (a) and (c) end at the same vectors (checked here).  Machines are noisy:
compare the ratios of one run.  (b), one at a time through the tail, shows what batching alone adds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from edit_speed import begin, end, interleaved, options, timed

from errata import registry
from errata.core.model import LM
from errata.core.tail import FullForward, Tail
from errata.methods.locate.run import LocateThenEditRun
from errata.request import EditRequest


def values(lm: LM, editor: Any, requests: list[EditRequest], runner: Any) -> torch.Tensor:
    """[N, D]: δ of each request; statistics, keys and the solve are left out."""
    job = LocateThenEditRun(editor, lm, [[r] for r in requests], (), runner)
    job.place()
    return torch.stack([f.delta for f in job.values(None)])


def compare(lm: LM, editor: Any, requests: list[EditRequest], repeat: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], Any]] = {
        "a_one_at_a_time_full_forward": lambda: torch.cat([values(lm, editor, [r], FullForward) for r in requests]),
        "b_one_at_a_time_tail": lambda: torch.cat([values(lm, editor, [r], Tail) for r in requests]),
        "c_one_batch_tail": lambda: values(lm, editor, requests, Tail),
    }
    values(lm, editor, requests[:2], Tail)  # warm up: prefixes are sampled once
    seconds, found = interleaved(ways, repeat, lm.device, len(requests), "values")
    a, b, c = (min(s) for s in seconds.values())
    exact = found["a_one_at_a_time_full_forward"]
    apart = torch.linalg.vector_norm(exact - found["c_one_batch_tail"], dim=1) / torch.linalg.vector_norm(exact, dim=1)
    return {
        "rows_per_request": 1 + sum(count for _, count in editor.prefixes) + 1,
        "seconds": seconds,
        "ratio_a_to_b": round(a / b, 2),
        "ratio_a_to_c": round(a / c, 2),
        "largest_relative_difference_a_c": float(apart.max()),
        "median_relative_difference_a_c": float(apart.median()),
    }


def edits(lm: LM, requests: list[EditRequest], sizes: list[int]) -> list[dict[str, Any]]:
    """Seconds an edit and peak memory of ROME (one) and MEMIT (a joint patch of each size), statistics not counted."""
    rows = []
    for name in ("rome", "memit"):
        editor = registry.get("method", name).for_model(lm, v_stop=0.0)
        editor.prepare(lm)
        for size in [1] if name == "rome" else sizes:
            chosen = (requests * (size // len(requests) + 1))[:size]
            if lm.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken, _ = timed(lambda e=editor, c=chosen: e.edit(lm, c), lm.device)  # type: ignore[misc]
            peak = torch.cuda.max_memory_allocated() if lm.device.type == "cuda" else 0
            rows.append({"method": name, "edits": size, "seconds": taken, "seconds_per_edit": taken / size, "peak_bytes": peak})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = options(__doc__, "values", 100, 20)
    parser.add_argument("--prefixes", default="[[5,10],[10,10]]", help="(tokens, count) pairs: ROME's own")
    parser.add_argument("--layer", type=int, help="the method's own without it")
    parser.add_argument("--edits", default="", help="joint edits of MEMIT, with commas: seconds an edit and peak memory instead")
    args = parser.parse_args()
    lm, requests, result = begin(args, args.values)
    more = {"layers": [args.layer]} if args.layer is not None else {}
    editor = registry.get("method", "rome").for_model(lm, v_steps=args.steps, v_stop=0.0, prefixes=json.loads(args.prefixes), **more)
    result["layers"] = list(editor.target_layers(lm))
    if args.edits:
        result["edits"] = edits(lm, requests, [int(n) for n in args.edits.split(",")])
    else:
        result |= compare(lm, editor, requests, args.repeat)
    end(result, args.out)


if __name__ == "__main__":
    main()
