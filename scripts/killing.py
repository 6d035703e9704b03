"""What `kill_ledger.py` and `kill_serve.py` share: the command line, the states that must be found after a kill, and what is told."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass
class Trial:
    """Edits, and what a ledger that nothing happens to says after each: ``states`` are logits [N, T, V] of ``encoded``, one after each
    edit; making them took ``length`` seconds."""

    args: argparse.Namespace
    lm: Any
    settings: dict[str, Any]
    wanted: list[Any]
    encoded: Any
    states: list[Any]
    length: float
    drawn: random.Random


def begin(about: str | None) -> Trial:
    """The command line read, the model loaded, the edits made once without a kill in OUT/whole."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    import torch

    import errata
    from errata.config import parse_sets
    from errata.ledger import Ledger
    from errata.request import EditRequest

    torch.set_num_threads(1)  # a fork takes no threads along
    lm, settings = errata.load(args.model), parse_sets(args.set)
    wanted = [EditRequest(f"Question {i}: the capital of France is", "Rome") for i in range(args.edits)]
    encoded = lm.batch(lm.encode([r.prompt for r in wanted]))
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    whole, began = Ledger.open(args.out / "whole", lm), time.monotonic()
    whole.apply(wanted, mode="continual", settings=settings, force=True)
    length = time.monotonic() - began
    states = [lm.logits(encoded, [whole.stack(at=n)]) for n in range(len(wanted) + 1)]
    return Trial(args, lm, settings, wanted, encoded, states, length, random.Random(args.seed))


def end(trial: Trial, kills: int, wrong: list[dict[str, Any]], unread: int, ledgers: int) -> NoReturn:
    """What was found, as JSON; the exit code says whether anything was wrong."""
    said = {"seconds": round(trial.length, 2), "kills": kills, "wrong": wrong, "committed_unread": unread, "ledgers": ledgers}
    print(json.dumps(said), flush=True)
    raise SystemExit(bool(wrong))
