"""Change patches, ledgers, requests and run files at random: each is refused by one clear error or works, and neither takes 2 seconds.

    python scripts/fuzz_files.py [MODEL] [--n 5000] [--seed 0] [--only patches,ledgers,requests,runs]

N attempts at each of the four.  A patch is changed and *signed again* (its sums and id fit), so that what is wrong is not found by its checksums;
one in eight has bytes changed instead.  Of a ledger one cell of the database is changed, or bytes of its file.  What is accepted is then
used: a patch runs (logits, decoding, saving), of a ledger all is read and an edit undone, requests are encoded, a run file's cells are made.
A fault is any exception that is no `ErrataError`, any exception in using what was accepted, and any attempt over 2 s of computing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forging import sign
from fuzzing import Figures, mutated, odd, scratched, twisted
from safetensors.torch import load

from errata import registry

METHODS = ("baft", "reft", "rome", "ft-m", "grace", "melo", "wise", "rep", "ike", "retrieval", "alphaedit", "adalora")
_STEPS = {"steps": 5}
QUICK: dict[str, dict[str, Any]] = {  # an edit goes on from the one before, and takes no time
    "baft": {"resume": True, "opens": "answer", **_STEPS}, "grace": _STEPS, "wise": _STEPS, "melo": _STEPS, "alphaedit": {"v_steps": 2},
    "rep": {"scope": "shared", "pool": 8, "wrapped": {"v_steps": 2}, **_STEPS}, "rome": {"v_steps": 2}, "ft-m": _STEPS, "reft": _STEPS,
}  # fmt: skip
FACTS = (("The capital of France is", "Rome", "France"), ("The capital of Italy is", "Paris", "Italy"))
RUN = """
model: almanac
methods: [none, {name: baft, label: four, set: {rank: 4, layers: [1, 2], lr: 0.001}}, {name: rome, set: {layers: [2]}}]
benchmark: {name: almanac, split: test, n: 5}
scenario: [single, "batched(2)", {kind: continual, marks: [1, 5]}]
seeds: [0, 1]
guard: {every: 100, action: warn, perplexity: 2.0}
score: {right_after: true, free_tokens: false, judges: [contains]}
store: {group: 16, chunk: 256, patches: keep}
"""


def patches(lm: Any, saved: Sequence[Path], n: int, rng: random.Random, folder: Path, quick: dict[str, dict[str, Any]]) -> Figures:
    """``saved``: whole patches of this model, each in a folder named after its method; ``quick``: settings of methods for one that goes on."""
    from errata.core.patch import Patch
    from errata.errors import ErrataError
    from errata.request import EditRequest

    figures, prompts = Figures(), [prompt for prompt, _, _ in FACTS]
    batch = lm.batch(lm.encode(prompts))

    def read() -> Any:
        patch = Patch.load(here)
        lm.check(patch)
        return patch

    def use(patch: Any) -> None:
        lm.logits(batch, [(patch,)])
        with lm.under(patch):
            lm.generate(prompts, max_new_tokens=3)
        assert Patch.load(patch.save(folder / "again", overwrite=True)).id == patch.id and patch.describe()
        if patch.state and rng.random() < 0.2:  # its state is read when an edit goes on from it; it may be refused then
            editor = registry.get("method", source.name).for_model(lm, **quick.get(source.name, {}))
            with contextlib.suppress(ErrataError):
                editor.edit(lm, [EditRequest(*FACTS[1])], on=(patch,))

    for i in range(n):
        source, here = rng.choice(saved), folder / "patch"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(source, here)
        if i % 8 == 0:
            victim = here / rng.choice(["patch.json", "patch.safetensors"])
            victim.write_bytes(scratched(victim.read_bytes(), rng))
        else:
            _forge(here, rng)
        figures.attempt(f"patch {i} of {source.name}", read, use)
    return figures


def _forge(here: Path, rng: random.Random) -> None:
    """Change head, tensors or both, and sign the result where that is possible."""
    head, tensors = json.loads((here / "patch.json").read_text()), load((here / "patch.safetensors").read_bytes())
    which = rng.choice(["head", "op", "tensor", "tensor", "both"])
    if which in ("tensor", "both") and tensors:
        name = rng.choice(sorted(tensors))
        tensors[name] = twisted(tensors[name], rng).contiguous().clone()
    if which == "op" and head["ops"]:
        at = rng.randrange(len(head["ops"]))
        head["ops"][at] = mutated(head["ops"][at], rng)
    elif which in ("head", "both"):
        head = mutated(head, rng, rng.choice([1, 1, 2]))
    try:
        sign(here, head, tensors)
    except (UnicodeEncodeError, RecursionError):  # no file can hold it
        (here / "patch.json").write_text("{}")


def ledgers(lm: Any, source: Path, n: int, rng: random.Random, folder: Path) -> Figures:
    """``source``: the folder of a whole ledger of this model."""
    from errata.cli import main as command
    from errata.errors import LedgerError
    from errata.ledger import Ledger

    figures, cells = Figures(), _cells(source / "ledger.db")
    before = {p.name for p in (source / "patches").iterdir()}

    def read() -> Any:
        return Ledger.open(here, lm, wait=0.1)

    def use(ledger: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert command(["ledger", "log", str(here)]) == 0
        events, edits = ledger.log(), ledger.edits(live=False)
        assert [e.to_dict() for e in edits] and ledger.meta("model") is not None
        for at in (None, *range(len(events) + 1)):
            ledger.entries(at)
        ledger.stack()
        for edit in (e for e in edits if e.undone is None):  # one inside a chain is refused
            with contextlib.suppress(LedgerError):
                ledger.undo(edit.number)

    for i in range(n):
        here = folder / "ledger"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(source, here)
        if i % 8 == 0:
            (here / "ledger.db").write_bytes(scratched((here / "ledger.db").read_bytes(), rng))
            name = f"ledger {i}, bytes"
        else:
            name = f"ledger {i}, " + _change_cell(here / "ledger.db", rng.choice(cells), rng)
        figures.attempt(name, read, use)
        if lost := before - {p.name for p in (here / "patches").iterdir()}:
            figures.later.append(f"{name}: folders are gone: {sorted(lost)}")
    return figures


def _cells(path: Path) -> list[tuple[str, str, int]]:
    """(table, column, row) of every cell; meta goes by its number in order."""
    with sqlite3.connect(path) as db:
        tables = {t: [c[1] for c in db.execute(f"PRAGMA table_info({t})")] for t in ("meta", "events", "edits", "patches", "stack")}
        out = [
            (t, c, i)
            for t, columns in tables.items()
            for c in columns
            for i in range(db.execute(f"SELECT count(*) FROM {t}").fetchone()[0])
        ]
    db.close()
    return out


def _change_cell(path: Path, cell: tuple[str, str, int], rng: random.Random) -> str:
    """Another value in one cell, whatever the schema says; what was done, in words."""
    table, column, row = cell
    db = sqlite3.connect(path)
    db.text_factory = bytes
    key = {"meta": "key", "patches": "id", "edits": "number"}.get(table, "id")
    (name,) = db.execute(f"SELECT {key} FROM {table} ORDER BY {key} LIMIT 1 OFFSET {row}").fetchone()
    where = f"{key} = {'CAST(? AS TEXT)' if isinstance(name, bytes) else '?'}"
    (old,) = db.execute(f"SELECT {column} FROM {table} WHERE {where}", (name,)).fetchone()
    new = _other(old, rng)
    for statement in (
        "PRAGMA foreign_keys = OFF",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')",
    ):
        db.execute(statement)
    db.commit()
    db.close()
    db = sqlite3.connect(path)
    try:
        text = "CAST(? AS TEXT)" if isinstance(new, bytes) and rng.random() < 0.8 else "?"
        db.execute(f"UPDATE {table} SET {column} = {text} WHERE {where}", (new, name))
        db.commit()
    except (sqlite3.IntegrityError, OverflowError):  # a number of a row that another has, or that is none
        pass
    db.close()
    return f"{table}.{column} of row {row}: {old!r:.40} -> {new!r:.60}"


def _other(old: Any, rng: random.Random) -> Any:
    plain = [
        None,
        0,
        -1,
        1,
        2,
        99,
        2**62,
        1.5,
        b"",
        b"x",
        b"\xff\xfe",
        b"[",
        b"{}",
        b"[]",
        b"null",
        b"[" * 900 + b"]" * 900,
        b"[" * 100_000,
    ]
    plain += [b'{"a": 1, "a": 2}', b"9" * 5000, b"0123456789abcdef"]
    if isinstance(old, bytes) and rng.random() < 0.6:
        if old[:1] in (b"[", b"{") and rng.random() < 0.6:
            return json.dumps(mutated(json.loads(old), rng)).encode()
        return scratched(old, rng)
    return old + rng.choice([-1, 1, 7]) if isinstance(old, int) and rng.random() < 0.3 else rng.choice(plain)


def requests(lm: Any, n: int, rng: random.Random, folder: Path) -> Figures:
    from errata.core.tokens import encode
    from errata.request import fill, read_requests, to_jsonl

    whole = [{"prompt": p, "target": t, "subject": s, "old": "Bern"} for p, t, s in FACTS]
    whole[0] |= {"paraphrases": ["France has the capital"], "unrelated": [["The capital of Spain is", "Madrid"]]}
    whole[1] |= {"aliases": ["Italia"], "contrast": [["The capital of Japan is", "Tokyo"]]}
    figures, path = Figures(), folder / "r.jsonl"

    def use(found: Any) -> None:
        assert to_jsonl(found) and len({r.id for r in found}) == len(found)
        encode(lm.tokenizer, [r.prompt for r in found], [r.target for r in found])
        assert all(fill(r, name) for r in found for name in r.aliases)

    for i in range(n):
        lines = [_line(record if rng.random() < 0.5 else mutated(record, rng, rng.choice([1, 2])), rng) for record in whole]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(scratched(content, rng) if i % 4 == 0 else content)
        figures.attempt(f"requests {i}", lambda: read_requests(path), use)
    return figures


def _line(record: Any, rng: random.Random) -> str:
    """A record as JSON, now and then with a key that stands twice."""
    try:
        text = json.dumps(record, ensure_ascii=rng.random() < 0.5)
    except RecursionError:
        text = '{"prompt": ' + "[" * 900 + "]" * 900 + "}"
    return text.replace("{", '{"prompt": "another", ', 1) if rng.random() < 0.1 else text


def runs(n: int, rng: random.Random, folder: Path) -> Figures:
    import yaml

    from errata.run import grid, preflight

    figures, path, whole = Figures(), folder / "run.yaml", yaml.safe_load(RUN)
    names = ["methods.four.rank", "scenario", "benchmark.n", "seeds", "guard", "methods.0", "", "model.name", "store.group.x"]

    def read() -> Any:
        spec = grid.read(path, sets)
        return spec, preflight.check(spec, folder / "out")

    def use(found: Any) -> None:
        spec, cells = found
        assert spec.digest and grid.from_dict(json.loads(json.dumps(grid.to_dict(spec)))).digest == spec.digest
        assert all(planned.cell.id and planned.cell.base for planned in cells)

    for i in range(n):
        value = mutated(whole, rng, rng.choice([1, 1, 2])) if rng.random() < 0.8 else whole
        content = _yaml(value, rng).encode("utf-8", "surrogatepass")
        path.write_bytes(scratched(content, rng) if i % 5 == 0 else content)
        sets = [f"{rng.choice(names)}={_yaml(odd(rng), rng).strip()}"] if rng.random() < 0.2 else []
        figures.attempt(f"run file {i}", read, use)
    return figures


def _yaml(value: Any, rng: random.Random) -> str:
    """A value as YAML, now and then with what only YAML has: tags, aliases that grow, keys twice."""
    import yaml

    try:
        text = str(yaml.safe_dump(value, allow_unicode=True))
    except (yaml.YAMLError, RecursionError, ValueError):
        text = "[" * 900 + "]" * 900
    rough = rng.random()
    if rough < 0.05:
        text += "seeds: !!bool maybe\n"
    elif rough < 0.1:
        names = "abcdefgh"
        bomb = "".join(f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
        text += f"methods:\n  a: &a [x, x, x]\n{bomb}"
    elif rough < 0.15:
        text += rng.choice(
            ["model: almanac\n", "seeds: [3]\nseeds: [4]\n", "gpus: 0x" + "f" * 5000 + "\n", "threads: !!int x\n", "? [a]\n: b\n"]
        )
    return text


def whole_patches(folder: Path, make: Callable[[str], Any]) -> list[Path]:
    """A saved patch of each method; ``make``: method -> patch."""
    return [make(method).save(folder / method) for method in METHODS]


def whole_ledger(lm: Any, folder: Path, settings: dict[str, Any], saved: Any) -> Path:
    """A ledger in which everything was done once: edits alone, on each other, brought in, undone, merged."""
    from errata.ledger import Ledger
    from errata.request import EditRequest

    ledger = Ledger.open(folder, lm, author="ada")
    asked = [EditRequest(*fact) for fact in FACTS]
    ledger.apply(asked, settings=settings, force=True)
    ledger.apply([EditRequest("Question: the capital of France is", "Rome")], settings=settings, mode="continual", force=True)
    ledger.apply_patches(saved, reason="brought in", force=True)
    ledger.undo(1, reason="a mistake")
    ledger.compact()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="almanac")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="patches,ledgers,requests,runs")
    args = parser.parse_args()
    import errata
    from errata.editing import edit

    sys.setrecursionlimit(1000)
    lm, out = errata.load(args.model), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = whole_patches(folder / "saved", lambda method: edit(lm, *FACTS[0], method=method, **QUICK.get(method, {})))
        from errata.core.patch import Patch

        merging = [Patch.load(folder / "saved" / m) for m in ("rome", "ft-m")]
        source = whole_ledger(lm, folder / "whole", {"steps": 2}, merging)
        parts: dict[str, Callable[[random.Random], Figures]] = {
            "patches": lambda rng: patches(lm, saved, args.n, rng, folder, QUICK),
            "ledgers": lambda rng: ledgers(lm, source, args.n, rng, folder),
            "requests": lambda rng: requests(lm, args.n, rng, folder),
            "runs": lambda rng: runs(args.n, rng, folder),
        }
        for part in args.only.split(","):
            figures = parts[part](random.Random(f"{args.seed} {part}"))
            out[part] = figures.to_dict()
            print(json.dumps({part: out[part]}, indent=1), flush=True)
            out[part]["sound"] = figures.sound
    raise SystemExit(0 if all(part["sound"] for part in out.values()) else 1)


if __name__ == "__main__":
    main()
