"""What was acknowledged survives: kills, a full disk, damaged folders, two writers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import lm as trained
from ledgers import REQUESTS, SETTINGS, logits, same
from tiny import fill_disk

import errata
from errata.errors import LedgerError, PatchError, StorageError
from errata.ledger import Ledger
from errata.model import LM
from errata.request import EditRequest

HOW = {"settings": SETTINGS, "force": True}
QUICK = ["--set", "rank=2", "--set", "steps=4", "--mode", "continual", "--force"]


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


def copied(folder: Path, lm: LM, to: Path) -> Ledger:
    return Ledger.open(shutil.copytree(folder, to / "book"), lm)


def names(ledger: Ledger) -> list[str]:
    return sorted(p.name for p in ledger.shelf.folder.iterdir())


# -- kill ------------------------------------------------------------------------------------------------------


def test_kills_at_random_moments_of_continual_editing(tiny: str, tmp_path: Path) -> None:
    """Each through the command in a process of its own; the state is a prefix that holds every acknowledged edit."""
    lm = errata.load(tiny)
    wanted = [EditRequest(f"The capital of France is {'very ' * i}".strip(), "Rome") for i in range(12)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r.to_dict()) + "\n" for r in wanted))
    argv = [sys.executable, "-m", "errata", "ledger", "apply"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(errata.__file__).parents[1])}
    threads, drawn = torch.get_num_threads(), random.Random(0)
    torch.set_num_threads(1)
    try:
        whole = Ledger.open(tmp_path / "whole", lm)
        whole.apply(wanted, mode="continual", settings={"rank": 2, "steps": 4}, force=True)
        states = [logits(lm, whole.stack(at=n)) for n in range(len(wanted) + 1)]
        for kill in range(3):
            folder = tmp_path / f"killed-{kill}"
            command = [*argv, str(folder), "--model", tiny, "--requests", str(tmp_path / "r.jsonl"), *QUICK]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(kill + 1)]
            time.sleep(drawn.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            told += process.stdout.read().splitlines()
            process.wait()
            process.stdout.close()
            acknowledged = sum("is live" in line for line in told)
            again = Ledger.open(folder, lm)
            count = len(again.edits())
            assert kill + 1 <= acknowledged <= count <= acknowledged + 1
            assert torch.equal(logits(lm, again.stack()), states[count])
            assert names(again) == sorted(e.patch for e in again.edits())  # nothing torn lies about
    finally:
        torch.set_num_threads(threads)


def test_a_torn_apply_is_swept_at_the_next_open(one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    before, kept = logits(lm, book.stack()), names(book)
    shutil.copytree(book.shelf.folder / kept[0], book.shelf.folder / "0123456789abcdef")
    (book.shelf.folder / ".0123.tmp").mkdir()
    with book.record.writing():  # another is at work: what lies there may be its own
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
    from errata.ledger.record import Writer

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
    folder = book.shelf.folder / edit.patch
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        os.truncate(folder / "patch.safetensors", 100)
    again = Ledger.open(book.folder, lm)  # it opens, and says what is wrong when the patch must run
    assert again.edits() == [edit]
    with pytest.raises(PatchError, match="edit 1 cannot run: .*--repair"):
        again.stack()
    assert [h.status for h in again.check().held] == ["damaged"]
    assert again.check(repair=True).repaired == ((1, True),)
    assert torch.equal(logits(lm, again.stack()), before) and again.log()[-1].verb == "repair"


def test_a_damaged_patch_can_be_undone_or_put_back(one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    whole = book.stack()
    os.truncate(book.shelf.folder / whole[0].id / "patch.json", 10)
    Ledger.open(book.folder, lm).take(whole, force=True)
    again = Ledger.open(book.folder, lm)
    assert same(again, whole) and len(again.edits()) == 1
    os.truncate(book.shelf.folder / whole[0].id / "patch.json", 10)
    last = Ledger.open(book.folder, lm)
    last.undo(1)
    assert last.stack() == ()


def test_a_damaged_database_is_said(one: Path, lm: LM, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one, tmp_path / "book"))
    (folder / "ledger.db").write_bytes(b"no database, " * 100)
    with pytest.raises(StorageError, match="cannot be read .*the patch folders beside it are whole"):
        Ledger.open(folder, lm)


# -- two writers -----------------------------------------------------------------------------------------------


def test_a_second_writer_waits_or_gets_a_clear_error(one: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(one, lm, tmp_path)
    patient, hasty = Ledger.open(book.folder, author="bob"), Ledger.open(book.folder, wait=0.05)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(patient.undo(1).edit))
    with book.record.writing() as writer:
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
        book.take(patch, force=True)
        return True

    def read() -> bool:
        with book.record.reading() as view:
            return [e.number for e in view.edits()] == [e.edit for e in view.entries()]

    threads = [threading.Thread(target=loop, args=(step,)) for step in (change, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and len(book.log()) == 41 and same(book, patch)
