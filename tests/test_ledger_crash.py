"""What was acknowledged survives: kills, a full disk, damaged folders, two writers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm as trained
from ledgers import REQUESTS, SETTINGS, WEIGHTS, copied, logits, names, same
from processes import ROOT, own
from tiny import fill_disk

import errata
from errata.core.model import LM
from errata.core.patch import Op, Patch
from errata.errors import LedgerError, PatchError, StorageError
from errata.ledger import Ledger, patch_store
from errata.ledger.editors import ConfiguredEditor

HOW = {"settings": SETTINGS, "force": True}


@pytest.fixture(scope="module")
def lm() -> LM:
    return trained("llama")


@pytest.fixture
def book(lm: LM, tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "book", lm)


@pytest.fixture(scope="module")
def one(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with one edit."""
    ledger = Ledger.open(tmp_path_factory.mktemp("one") / "book", lm)
    ledger.apply(REQUESTS[:1], **HOW)
    return ledger.folder


# -- kill ------------------------------------------------------------------------------------------------------


def test_kills_at_random_moments_of_continual_editing(tiny: str, tmp_path: Path) -> None:
    """In forks of one process, which fall into editing; `scripts/kill_ledger.py` says what is compared."""
    argv = [str(ROOT / "scripts" / "kill_ledger.py"), tiny, "--kills", "6", "--edits", "8", "--out", str(tmp_path / "out")]
    out, err = own([*argv, "--set", "rank=2", "--set", "steps=4"]).communicate(timeout=300)
    found = json.loads(out or "{}")
    assert found.get("kills") == 6 and found["wrong"] == [], err


def test_a_kill_of_the_command_keeps_what_it_said(tiny: str, tmp_path: Path) -> None:
    wanted = [{"prompt": f"Say {i}", "target": "Rome"} for i in range(50)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, wanted)))
    argv = ["-m", "errata", "ledger", "apply", str(tmp_path / "book"), "--model", tiny, "--requests", str(tmp_path / "r.jsonl")]
    process = own([*argv, "--mode", "continual", "--force", "--set", "rank=2", "--set", "steps=4"])
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(2)]
    process.kill()
    told += process.communicate()[0].splitlines()
    count = len(Ledger.open(tmp_path / "book", errata.load(tiny)).edits())
    assert 2 <= sum("is live" in line for line in told) <= count < 50
    assert process.returncode == -signal.SIGKILL


def test_a_torn_apply_is_swept_at_the_next_open(one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    before, kept = logits(lm, book.stack()), names(book)
    shutil.copytree(book.patch_store.folder / kept[0], book.patch_store.folder / "0123456789abcdef")
    (book.patch_store.folder / ".0123.tmp").mkdir()
    with book.database.write_transaction():  # another is at work: what lies there may be its own
        Ledger.open(book.folder, lm)
        assert len(names(book)) == 3
    again = Ledger.open(book.folder, lm)
    assert names(again) == kept and torch.equal(logits(lm, again.stack()), before)


def test_a_ledger_killed_before_its_tables_is_begun_again(lm: LM, tmp_path: Path) -> None:
    (tmp_path / "book" / "patches").mkdir(parents=True)
    (tmp_path / "book" / "ledger.db").touch()
    with pytest.raises(LedgerError, match="holds no ledger"):
        Ledger.open(tmp_path / "book")
    Ledger.open(tmp_path / "book", lm).apply(REQUESTS[:1], **HOW)
    assert len(Ledger.open(tmp_path / "book").edits()) == 1


# -- full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [0, 1, 3, 4])
def test_a_disk_that_fills_while_a_patch_is_written(files: int, one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    before, kept = logits(lm, book.stack()), names(book)
    with pytest.MonkeyPatch.context() as patching:
        fill_disk(patching, files)
        with pytest.raises(StorageError, match="disk is full"):
            book.apply(REQUESTS[1:2], settings={"steps": 1}, force=True)
    assert torch.equal(logits(lm, book.stack()), before) and names(book) == kept and len(book.log()) == 1
    book.apply(REQUESTS[1:2], settings={"steps": 1}, force=True)
    assert len(book.edits()) == 2


def test_a_disk_that_fills_while_the_database_is_written(one: Path, lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = copied(one, lm, tmp_path)
    before, kept, connect = logits(lm, book.stack()), names(book), sqlite3.connect

    def small(*args: object, **how: object) -> sqlite3.Connection:
        db = connect(*args, **how)  # type: ignore[call-overload]
        db.execute("PRAGMA max_page_count = 1")  # what there is, and not a page more
        return db

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(StorageError, match=r"not written \(the disk is full\); the ledger is as it was before"):
        book.apply(REQUESTS[1:2], settings={"steps": 1}, force=True, reason="long " * 100_000)
    monkeypatch.undo()
    assert torch.equal(logits(lm, book.stack()), before) and names(book) == kept and len(book.log()) == 1


def test_an_error_between_the_patch_and_the_commit_leaves_nothing(
    one: Path, lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.ledger.database import Writer

    book = copied(one, lm, tmp_path)
    kept = names(book)

    def stop(*args: object) -> None:
        assert len(names(book)) == 2  # the patch is on the disk before the database speaks of it
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "add_edit", stop)
    with pytest.raises(KeyboardInterrupt):
        book.apply(REQUESTS[1:2], settings={"steps": 1}, force=True)
    assert names(book) == kept and len(book.log()) == 1


# -- damaged folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_patch_is_named_and_made_again(damage: str, one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    before, (edit,) = logits(lm, book.stack()), book.edits()
    folder = book.patch_store.folder / edit.patch
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        os.truncate(folder / "patch.safetensors", 100)
    again = Ledger.open(book.folder, lm)  # it opens, and says what is wrong when the patch must run
    assert again.edits() == [edit]
    with pytest.raises(PatchError, match=r"edit 1 cannot run: .*--repair"):
        again.stack()
    assert [h.status for h in again.check().held] == ["damaged"]
    assert again.check(repair=True).repaired == ((1, True),)
    assert torch.equal(logits(lm, again.stack()), before) and again.log()[-1].verb == "repair"


def test_a_damaged_patch_can_be_undone_or_put_back(one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    whole = book.stack()
    os.truncate(book.patch_store.folder / whole[0].id / "patch.json", 10)
    Ledger.open(book.folder, lm).apply_patches(whole, force=True)
    again = Ledger.open(book.folder, lm)
    assert same(again, whole) and len(again.edits()) == 1
    os.truncate(book.patch_store.folder / whole[0].id / "patch.json", 10)
    last = Ledger.open(book.folder, lm)
    last.undo(1)
    assert last.stack() == ()


def test_damaged_patches_that_come_out_otherwise_here_are_made_on_what_took_their_place(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine, which gives other last bits; all at once, and one more after that."""
    made = ConfiguredEditor.make

    def other(self: ConfiguredEditor, *args: Any) -> list[Patch]:
        def near(op: Op) -> Op:
            return replace(op, tensors={name: t * (1 + 1e-6) for name, t in op.tensors.items()})

        return [replace(p, ops=tuple(map(near, p.ops))) for p in made(self, *args)]

    Ledger.open(tmp_path / "book", lm).apply(REQUESTS, method="ft-m", settings=WEIGHTS, mode="continual", force=True)
    book = Ledger.open(tmp_path / "book", lm)
    before, patches = logits(lm, book.stack()), [e.patch for e in book.edits()]
    monkeypatch.setattr(ConfiguredEditor, "make", other)
    for broken in ((1, 2), (3,)):
        for number in broken:
            os.truncate(book.patch_store.folder / patches[number - 1] / "patch.safetensors", 100)
        book = Ledger.open(book.folder, lm)
        assert book.check(repair=True).repaired == tuple((number, False) for number in broken)
    assert not {e.patch for e in book.edits()} & set(patches) and (logits(lm, book.stack()) - before).abs().max() < 1e-3


def test_a_folder_that_a_killed_writer_left_is_flushed_before_it_counts(one: Path, lm: LM, tmp_path: Path) -> None:
    """It looks whole, but may be in the system's buffers only."""
    patch = Ledger.open(one, lm).stack()[0]
    book, flushed = Ledger.open(tmp_path / "book", lm), []
    patch.save(book.patch_store.folder / patch.id, sync=False)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(patch_store.storage, "flush", flushed.extend)
        book.apply_patches([patch], force=True)
    assert flushed == [book.patch_store.folder / patch.id] and same(book, [patch])


def test_a_damaged_database_is_said(one: Path, lm: LM, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one, tmp_path / "book"))
    (folder / "ledger.db").write_bytes(b"no database, " * 100)
    with pytest.raises(StorageError, match=r"cannot be read .*the patch folders beside it are whole"):
        Ledger.open(folder, lm)


# -- two writers -----------------------------------------------------------------------------------------------


def test_a_second_writer_waits_or_gets_a_clear_error(one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    patient, hasty = Ledger.open(book.folder, author="bob"), Ledger.open(book.folder, wait=0.05)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(patient.undo(1).edit))
    with book.database.write_transaction() as writer:
        writer.note("apply", "ada", "", {"edits": [], "patches": []})
        with pytest.raises(LedgerError, match=r"another is writing to this ledger \(waited 0.05 s\); try again"):
            hasty.undo(1)
        thread.start()
        assert len(patient.edits()) == 1  # readers do not wait
        time.sleep(0.1)
        assert not done
    thread.join(20)
    assert done == [1] and [e.author for e in book.log()][1:] == ["ada", "bob"]


def test_writers_and_readers_in_threads(one: Path, lm: LM, tmp_path: Path) -> None:
    """Every reader sees an edit and its patch together, whatever is written meanwhile."""
    book = copied(one, lm, tmp_path)
    patch = book.stack()
    wrong: list[object] = []

    def loop(step: Callable[[], bool]) -> None:
        try:
            wrong.extend("torn" for _ in range(20) if not step())
        except Exception as error:
            wrong.append(error)

    def change() -> bool:
        book.undo(book.edits()[0].number)
        book.apply_patches(patch, force=True)
        return True

    def read() -> bool:
        with book.database.read_transaction() as view:
            return [e.number for e in view.edits()] == [e.edit for e in view.entries()]

    threads = [threading.Thread(target=loop, args=(step,)) for step in (change, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and len(book.log()) == 41 and same(book, patch)
