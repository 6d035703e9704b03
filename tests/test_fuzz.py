"""A short run of `scripts/fuzz_files.py` on tiny models, and every cell of a ledger's database changed."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import fuzz_files
import pytest
from families import lm
from laws import QUICK, editor, model, patches
from ledgers import SETTINGS

from errata.core.patch import Patch
from errata.errors import ErrataError
from errata.ledger import Ledger


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    fuzz_files.whole_patches(root / "patches", lambda method: patches(method, "llama")[0])
    merging = [Patch.load(root / "patches" / method) for method in ("rome", "ft-m")]
    fuzz_files.whole_ledger(lm("llama"), root / "ledger", SETTINGS, merging)
    return root


def sound(figures: Any) -> None:
    assert figures.sound, figures.to_dict()
    assert figures.refused > figures.tried / 4 and figures.accepted > figures.tried / 50


def counts(*few_and_many: int) -> pytest.MarkDecorator:
    """So many by default, and so many when slow tests run, drawn otherwise."""
    few, many = few_and_many
    return pytest.mark.parametrize(("count", "seed"), [(few, 0), pytest.param(many, 1, marks=pytest.mark.slow)])


@counts(150, 300)
def test_patches(count: int, seed: int, whole: Path, tmp_path: Path) -> None:
    saved = sorted((whole / "patches").iterdir())
    sound(fuzz_files.patches(model("llama"), saved, count, random.Random(seed), tmp_path, QUICK))


@counts(30, 120)
def test_ledgers(count: int, seed: int, whole: Path, tmp_path: Path) -> None:
    sound(fuzz_files.ledgers(lm("llama"), whole / "ledger", count, random.Random(seed), tmp_path))


@counts(150, 600)
def test_requests(count: int, seed: int, tmp_path: Path) -> None:
    sound(fuzz_files.requests(lm("llama"), count, random.Random(seed), tmp_path))


@counts(80, 240)
def test_run_files(count: int, seed: int, tmp_path: Path) -> None:
    fuzz_files.runs(5, random.Random(0), tmp_path)  # what is imported at first is not timed
    sound(fuzz_files.runs(count, random.Random(seed), tmp_path))


WRONG: dict[str, list[Any]] = {  # of a column: what no errata has written there
    "events.time": [None, b"\xff"], "events.author": [None, b"\xff"], "events.reason": [None, b"\xff"], "events.verb": [None, b"\xff"],
    "events.details": [None, "", "{}", "[]", "{", '{"a": 1, "a": 2}', "[" * 900, "[" * 100_000, "9" * 5000, b"\xff", '{"edits": 5}'],
    "edits.requests": [None, "", "{}", "[]", "[5]", '[{"prompt": 5, "target": "b"}]', '[{"prompt": "a"}]', "[" * 900 + "]" * 900, 7],
    "edits.method": [None, b"\xff"], "edits.settings": ["", "[]", "5", "{", b"\xff", '{"a": 1, "a": 1}'],
    "edits.alone": [None, 2, "x", -1], "edits.applied": [None, 0, 99, "x"], "edits.undone": [99, "x", 0, -1],
    "patches.id": ["x", "../../etc/passwd", "0" * 16, b"\xff", ""], "patches.method": [None, b"\xff"],
    "patches.parameters": [None, -1, "x"],
    "patches.replaces": [None, "", "{}", "[5]", '["x"]', "[" * 900], "patches.stored": [None, 2, "x", -1],
    "stack.patch": [None, "x", "0" * 16], "stack.edit": [99, "x", 0], "stack.place": [None, "x", -1], "stack.since": [None, 99, "x", 0],
    "stack.until": [99, "x", -1], "meta.value": [None, b"\xff"], "meta.key": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("column", WRONG)
def test_every_cell_of_a_ledger(column: str, every: bool, whole: Path, tmp_path: Path) -> None:
    """Refused when the ledger is opened: one clear error that names the cell, and no folder is swept away for it.

    By default each value in one row, and each row with one value.
    """
    table, name = column.split(".")
    with sqlite3.connect(whole / "ledger" / "ledger.db") as db:
        count = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    db.close()
    kept = sorted(p.name for p in (whole / "ledger" / "patches").iterdir())
    for row in range(count):
        for n, value in enumerate(WRONG[column]):
            if not every and n % count != row and row % len(WRONG[column]) != n:
                continue
            folder = Path(shutil.copytree(whole / "ledger", tmp_path / f"{row}-{n}"))
            _set(folder / "ledger.db", table, name, row, value)
            with pytest.raises(ErrataError) as caught:
                Ledger.open(folder, lm("llama"))
                pytest.fail(f"{column} of row {row} as {value!r} is accepted")
            assert "bring ledger.db back from a copy" in str(caught.value) and len(str(caught.value)) < 700
            assert sorted(p.name for p in (folder / "patches").iterdir()) == kept
            shutil.rmtree(folder)


def _set(path: Path, table: str, column: str, row: int, value: Any) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
    db.commit()
    db.close()
    db = sqlite3.connect(path)
    key = {"meta": "key", "patches": "id", "edits": "number"}.get(table, "id")
    (name,) = db.execute(f"SELECT {key} FROM {table} ORDER BY {key} LIMIT 1 OFFSET {row}").fetchone()
    text = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
    db.execute(f"UPDATE {table} SET {column} = {text} WHERE {key} = ?", (value, name))
    db.commit()
    db.close()


@pytest.mark.parametrize("stored", [0])
def test_a_flipped_flag_costs_no_folder(stored: int, whole: Path, tmp_path: Path) -> None:
    """A patch that the database calls dropped is only swept away where the log says that compact dropped it."""
    folder = Path(shutil.copytree(whole / "ledger", tmp_path / "ledger"))
    with sqlite3.connect(folder / "ledger.db") as db:
        (patch,) = db.execute("SELECT id FROM patches WHERE stored = 1 ORDER BY id LIMIT 1").fetchone()
        db.execute("UPDATE patches SET stored = ? WHERE id = ?", (stored, patch))
    db.close()
    with pytest.raises(ErrataError, match=rf"row '{patch}', column stored: says that its folder was dropped"):
        Ledger.open(folder, lm("llama"))
    assert (folder / "patches" / patch).is_dir()


STATE = [
    ("alphaedit", "keys.0", lambda t: t[:, :5]), ("adalora", "E.0", lambda t: t[:, :1]), ("adalora", "B.0", lambda t: t.int()),
    ("grace", "labels", lambda t: t[:0]), ("melo", "labels", lambda t: t.float()), ("wise", "edits", lambda t: t.float()),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "change"), STATE, ids=[f"{m} {n}" for m, n, _ in STATE])
def test_a_patch_whose_state_is_damaged_is_not_gone_on_from(method: str, name: str, change: Any) -> None:
    whole = patches(method, "llama")[0]
    bad = Patch(whole.method, whole.settings, whole.base, whole.requests, whole.ops, {**whole.state, name: change(whole.state[name])})
    with pytest.raises(ErrataError, match=rf"patch {bad.id} cannot be gone on from: its state '{name}' is .*take it off"):
        editor(method).edit(model("llama"), whole.requests, on=(bad,))
