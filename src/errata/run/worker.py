"""``python -m errata.run.worker RUN CELL [--base]``: one cell in a process of its own; its outcome as the last line of stdout."""

from __future__ import annotations

import dataclasses
import json
import sys

from errata.run.executors import run_cell

if __name__ == "__main__":
    outcome = run_cell(sys.argv[1], sys.argv[2], "--base" in sys.argv[3:])
    sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
