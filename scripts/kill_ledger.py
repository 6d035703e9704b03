"""Kill `errata ledger apply` at random moments of continual editing: after each, a reopened ledger must hold exactly what was acknowledged.

    python scripts/kill_ledger.py MODEL --kills 50 --out FOLDER [--edits 12] [--seed 0] [--set rank=2 …]

Once without a kill (its states, by logits, are what must be found; its length sets the moments).  Then a ledger is edited by the command
in a child, killed (SIGKILL) at a moment drawn evenly from that length, reopened, checked and gone on with, until it holds all edits; then
a new ledger, until there were KILLS kills.  After each: the edits are a prefix that holds every acknowledged one and at most one more
(committed, its line not yet read), logits are bit for bit those of that prefix, and no torn folder is left.
Children are forked from a process that has loaded the model, so that moments fall into editing and not into the start of Python.
"""

from __future__ import annotations

import os
import signal
import time

from killing import begin, end


def killed(argv: list[str], after: float) -> tuple[int, bool]:
    """Run the command in a child; (edits it acknowledged, whether it was killed ``after`` seconds before it had ended)."""
    from errata.cli import main

    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.close(reading)
        os._exit(main(argv))
    os.close(writing)
    ends = time.monotonic() + after
    status = None
    while time.monotonic() < ends:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.001)
    else:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        told = stream.read().splitlines()
    hit = status == signal.SIGKILL
    if status and not hit:
        raise SystemExit(f"the command failed by itself (status {status})")
    return sum("is live" in line for line in told), hit


def main() -> None:
    import torch

    import errata
    from errata.ledger import Ledger
    from errata.request import write_requests

    trial = begin(__doc__)
    args, lm, wanted, encoded, states, length = trial.args, trial.lm, trial.wanted, trial.encoded, trial.states, trial.length
    errata.load = lambda *_, **__: lm  # the command in a child finds it loaded
    drawn, done, wrong, unread, books = trial.drawn, 0, [], 0, 0
    folder, count = args.out / "book-0", 0
    while done < args.kills:
        requests = args.out / "requests.jsonl"
        write_requests(requests, wanted[count:])
        argv = ["ledger", "apply", str(folder), "--model", args.model, "--requests", str(requests), "--mode", "continual", "--force"]
        told, hit = killed([*argv, *(x for s in args.set for x in ("--set", s))], drawn.uniform(0, length / 3))
        done += hit
        ledger = Ledger.open(folder, lm)
        had, count = count, len(ledger.edits())
        folders = sorted(p.name for p in ledger.patch_store.folder.iterdir())
        right = (
            had + told <= count <= had + told + hit
            and torch.equal(lm.logits(encoded, [ledger.stack()]), states[count])
            and folders == sorted(e.patch for e in ledger.edits())
        )
        unread += count - had - told
        wrong += [] if right else [{"ledger": folder.name, "had": had, "told": told, "found": count}]
        if count == len(wanted):
            books += 1
            folder, count = args.out / f"book-{books}", 0
    end(trial, done, wrong, unread, books + 1)


if __name__ == "__main__":
    main()
