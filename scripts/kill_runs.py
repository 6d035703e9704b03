"""Kill a run at random moments, go on with it, and compare with one that was left alone: every byte but times must be the same.

    python scripts/kill_runs.py RUN.yaml --kills 20 --out FOLDER [--seed 0] [--json]

Once without a kill (its length sets the moments); then KILLS runs, each killed (SIGKILL) once at a moment drawn evenly from that
length and run again to its end; then one run that is killed again and again, up to KILLS times, at shorter intervals.  Workers are
forked from a process that has loaded the model, so that moments fall into the run and not into the start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

TIMED = {"times.jsonl", "cost.json", ".lock"}


def differences(one: Path, other: Path) -> list[str]:
    """Files that only one of two runs has, or that differ; files of times left out."""

    def files(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name not in TIMED}

    a, b = files(one), files(other)
    return sorted(name for name in {**a, **b} if a.get(name) != b.get(name))


def forked(root: Path, spec: object, after: float | None) -> bool:
    """Run in a child; True when it was killed ``after`` seconds before it had ended."""
    from errata.run import executors

    child = os.fork()
    if not child:
        try:
            outcomes = executors.run(root, spec)  # type: ignore[arg-type]
            os._exit(1 if any(o.error for o in outcomes) else 0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(2)
    ends = time.monotonic() + after if after is not None else None
    while ends is None or time.monotonic() < ends:
        pid, status = os.waitpid(child, 0 if ends is None else os.WNOHANG)
        if pid:
            if status:
                raise SystemExit(f"the run failed by itself (status {status})")
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def parts(root: Path) -> int:
    """Parts on disk."""
    return sum(path.read_bytes().count(b"\n") for path in root.rglob("journal.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    from errata.run import executors, grid

    torch.set_num_threads(1)  # a fork takes no threads along
    spec = grid.read(args.file, ["threads=1"])
    executors._model(spec.model[0])
    drawn, whole = random.Random(args.seed), args.out / "whole"
    shutil.rmtree(args.out, ignore_errors=True)
    began = time.monotonic()
    forked(whole, spec, None)
    length = time.monotonic() - began
    lines, killed, different = [], 0, 0
    for i in range(args.kills):
        root, moment = args.out / f"killed-{i + 1}", drawn.uniform(0, length)
        hit = forked(root, spec, moment)
        had = parts(root)
        forked(root, spec, None)
        wrong = differences(whole, root)
        killed, different = killed + hit, different + bool(wrong)
        lines.append({"after": round(moment, 3), "killed": hit, "parts_then": had, "different": wrong})
        shutil.rmtree(root) if not wrong else None
    root, again = args.out / "again-and-again", 0
    while again < args.kills and forked(root, spec, drawn.uniform(0, length / 3)):
        again += 1
    forked(root, spec, None)
    wrong = differences(whole, root)
    out = {
        "seconds": round(length, 2),
        "parts": parts(whole),
        "killed": killed,
        "different": different + bool(wrong),
        "again_and_again": again,
    }
    if args.json:
        print(json.dumps({**out, "runs": lines}))
    else:
        for line in lines:
            print(line)
        print(out)
    raise SystemExit(bool(out["different"]))


if __name__ == "__main__":
    main()
