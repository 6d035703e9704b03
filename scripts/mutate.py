"""Change the source in one place at random, run the tests that pass that line, count which changes no test sees.

    PYTHONPATH=scripts pytest -p lines_of_tests -n 2 --dist loadgroup --lines-of-tests lines    # once: which test runs which line
    python scripts/mutate.py lines [--n 300] [--seed 0] [--jobs 2] [--seconds 60] --out FILE.json

The changes are cosmic-ray's (operators, comparisons, numbers, keywords, decorators, loops, exceptions); N places are drawn from `core`, `score`,
`ledger` and `methods/subspace`, of each place one change.  Not drawn: annotations and what is not run by any test (that is counted).  Each change
is made in a copy of the repository, by a process of its own; the tests that run the line are taken from the quickest on, until SECONDS of them.
Tests of the source's own form (house, docs, types) do not count.  The file grows line by line: the same command goes on where it stopped.
Needs `pip install cosmic-ray coverage`.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AREAS = ("core", "score", "ledger", "methods/subspace")
OF_FORM = ("test_house", "test_docs", "test_types", "test_import", "test_pages", "test_scripts")


def places(path: Path) -> dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[str, int]]]:
    """{(begin, end), lines from 1: [(operator, its which occurrence)]} of a file, without annotations."""
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    tree, found = get_ast_from_path(path), defaultdict(list)
    ignored = list(annotations(path))
    for name in cosmic_ray.plugins.operator_names():
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():  # asks for names of variables
            continue
        positions = itertools.chain.from_iterable(kind().mutation_positions(node) for node in ast_nodes(tree))
        for occurrence, (begin, end) in enumerate(positions):
            if not any(a <= begin < b for a, b in ignored):
                found[begin, end].append((name, occurrence))
    return found


def annotations(path: Path) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file stand: ``from __future__ import annotations`` keeps them from being run."""
    for node in ast.walk(ast.parse(path.read_text())):
        for name in ("annotation", "returns"):
            if (one := getattr(node, name, None)) is not None:
                yield (one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)


def counted(folder: Path) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
    """({file in src/errata: {line: tests that run it}}, {test: seconds}) of what `lines_of_tests` wrote."""
    lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    seconds: dict[str, float] = {}
    for path in folder.glob("*.json"):
        own = json.loads(path.read_text())
        seconds |= own["seconds"]
        known = list(own["seconds"])
        for file, tests in own["lines"].items():
            for line, which in tests.items():
                lines[file][int(line)].update(known[i] for i in which)
    return lines, seconds


def there() -> set[str]:
    """The tests that there are now."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line for line in said.splitlines() if "::" in line}


def drawn(n: int, seed: int, lines: dict[str, dict[int, set[str]]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """N changes of lines that a test runs, and how many places there are, and how many that no test runs."""
    every, dark = [], 0
    for area in AREAS:
        for path in sorted((ROOT / "src/errata" / area).rglob("*.py")):
            file = path.relative_to(ROOT / "src/errata").as_posix()
            for (begin, end), changes in sorted(places(path).items()):
                if lines[file][begin[0]]:
                    every.append((file, begin, end, changes))
                else:
                    dark += 1
    rng = random.Random(seed)
    chosen = rng.sample(every, min(n, len(every)))
    changes = [{"file": f, "line": b[0], "column": b[1], "change": rng.choice(c)} for f, b, _, c in chosen]
    return changes, {"places": len(every) + dark, "run by no test": dark}


def command(tests: Sequence[str], seconds: dict[str, float], budget: float) -> tuple[list[str], bool]:
    """(the quickest of the tests, of together ``budget`` seconds, by file; whether that is all)."""
    able = sorted((seconds[t], t) for t in tests if t in seconds and not t.split("::")[0].endswith(tuple(f"{f}.py" for f in OF_FORM)))
    taken, total = [], 0.0
    for cost, test in able:
        if taken and total + cost > budget:
            return sorted(taken), False
        taken.append(test)
        total += cost
    return sorted(taken), True


def attempt(copy: Path, change: dict[str, Any], tests: list[str], limit: float) -> dict[str, Any]:
    """What became of one change: the tests' verdict, the changed line."""
    from cosmic_ray.mutating import apply_mutation
    from cosmic_ray.plugins import get_operator

    path = copy / "src/errata" / change["file"]
    before = path.read_text()
    name, occurrence = change["change"]
    try:
        apply_mutation(path, get_operator(name)(), occurrence)
        line = next((b for a, b in itertools.zip_longest(before.splitlines(), path.read_text().splitlines()) if a != b), "")
        verdict = run(copy, tests, limit)
    finally:
        path.write_text(before)
    shown = {"before": before.splitlines()[change["line"] - 1].strip(), "after": (line or "").strip()}
    return {**change, "change": name.rpartition("/")[2], **shown, "verdict": verdict, "tests": len(tests)}


def run(copy: Path, tests: list[str], limit: float) -> str:
    """killed, survived, or hung: the verdict of the tests on the copy as it is."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as ids:
        ids.write("\n".join(tests))
        ids.flush()
        words = [
            sys.executable,
            "-B",
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--no-header",
            f"@{ids.name}",
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen(words, cwd=copy, env=environment, start_new_session=True, **quiet)
        try:
            return "survived" if child.wait(limit) == 0 else "killed"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return "hung"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines, seconds = counted(args.lines)
    now = there()
    seconds = {test: cost for test, cost in seconds.items() if test in now}
    changes, counts = drawn(args.n, args.seed, lines)
    journal = args.out.with_suffix(".jsonl")
    done = [json.loads(text) for text in journal.read_text().splitlines()] if journal.exists() else []
    seen = {(d["file"], d["line"], d["column"]) for d in done}
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.jobs):
            copy = Path(folder, f"copy{i}")
            subprocess.run(
                ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-f", str(copy), "HEAD"], check=True, capture_output=True
            )
            copies.put(copy)

        def one(change: dict[str, Any]) -> dict[str, Any]:
            tests, whole = command(sorted(lines[change["file"]][change["line"]]), seconds, args.seconds)
            copy = copies.get()
            try:
                found = attempt(copy, change, tests, 120 + 5 * args.seconds) if tests else {**change, "verdict": "no test of behaviour"}
            finally:
                copies.put(copy)
            return found | {"whole": whole}

        waiting = [c for c in changes if (c["file"], c["line"], c["column"]) not in seen]
        with ThreadPoolExecutor(args.jobs) as pool, journal.open("a") as log:
            for found in pool.map(one, waiting):
                done.append(found)
                log.write(json.dumps(found) + "\n")
                log.flush()
                write(args.out, done, {"drawn": len(changes), "seed": args.seed, "seconds": args.seconds, **counts})
                print(
                    f"{time.strftime('%H:%M:%S')} {len(done)} of {len(changes)}: {found['verdict']}: {found['file']}:{found['line']}",
                    flush=True,
                )
        for copy in list(copies.queue):
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(copy)], check=False, capture_output=True)


def write(out: Path, done: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """The figures so far."""
    verdicts = Counter(d["verdict"] for d in done)
    survived = [d for d in done if d["verdict"] not in ("killed", "hung")]
    out.write_text(json.dumps({"n": len(done), **about, "verdicts": dict(verdicts), "survived": survived}, indent=1) + "\n")


if __name__ == "__main__":
    main()
