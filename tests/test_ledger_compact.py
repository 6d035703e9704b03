"""Compacting: the same logits from fewer files, and every edit can still be taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import lm as trained
from ledgers import REQUESTS, SETTINGS, WEIGHTS, logits, names, same

from errata.core.model import LM
from errata.errors import LedgerError
from errata.ledger import Ledger


@pytest.fixture(scope="module")
def lm() -> LM:
    return trained("llama")


@pytest.fixture
def book(lm: LM, tmp_path: Path) -> Ledger:
    """Two edits of weights, alone; one of BaFT above them."""
    ledger = Ledger.open(tmp_path / "book", lm)
    ledger.apply(REQUESTS[:2], method="lora", settings={"steps": 3, "rank": 2}, force=True)
    ledger.apply(REQUESTS[2:], settings=SETTINGS, force=True)
    return ledger


def test_merged_edits_give_the_same_logits_and_can_be_undone(book: Ledger, lm: LM) -> None:
    plain = book.stack()
    before = logits(lm, plain)
    done = book.compact()
    assert [edits for _, edits in done.merges] == [(1, 2)] and len(book.stack()) == 2
    assert (logits(lm, book.stack()) - before).abs().max() < 1e-5
    assert book.compact().merges == ()  # nothing more to do
    assert {p.edits for p in book.blame(REQUESTS[0].prompt).parts} == {(1,), (2,), (3,)}
    book.undo(1)
    assert same(book, plain[1:]) and len(book.log()) == 5


def test_folders_of_undone_edits_go_and_history_stays(book: Ledger, lm: LM) -> None:
    gone = book.show(3).patch
    book.undo(3)
    done = book.compact(merge=False)
    assert done.dropped == (gone,) and done.freed > 1000 and gone not in names(book)
    assert book.show(3).requests == (REQUESTS[2],) and [e.verb for e in book.log()] == ["apply", "apply", "undo", "compact"]
    assert len(book.stack(at=1)) == 2
    with pytest.raises(LedgerError, match="were dropped by compact; that state cannot run any more"):
        book.stack(at=2)


def test_lean_keeps_what_runs_and_undo_makes_the_rest_again(book: Ledger, lm: LM) -> None:
    before = logits(lm, book.stack())
    other = book.stack()[1:]
    book.compact(lean=True)
    assert len(names(book)) == 2 and (logits(lm, book.stack()) - before).abs().max() < 1e-5
    with pytest.raises(LedgerError, match=r"the files of edit 2, which would run again, were dropped.*undo 1 --remake"):
        book.undo(1)
    done = book.undo(1, remake=True)
    assert [n for n, _, _ in done.remade] == [2]
    assert (logits(lm, book.stack()) - logits(lm, other)).abs().max() < 1e-4


def test_a_merge_whose_folder_went_is_made_again_whole_and_bit_for_bit(lm: LM, tmp_path: Path) -> None:
    """Merges of merges, lean: nothing of edits 1 and 2 is left but the record, and they were trained side by side."""
    how = {"method": "ft-m", "settings": WEIGHTS, "force": True}
    book = Ledger.open(tmp_path / "book", lm)
    book.apply(REQUESTS[:2], **how)
    pair = book.stack()
    book.compact(lean=True)
    book.apply(REQUESTS[2:3], **how)
    book.compact(lean=True)
    with pytest.raises(LedgerError, match=r"dropped by `compact --lean`.*undo 3 --remake"):
        book.undo(3)
    assert [n for n, _, _ in book.undo(3, remake=True).remade] == [1, 2]
    assert all(e.stored for e in book.entries()) and [p.id for p in book.stack()] == [p.id for p in pair] and same(book, pair)
    assert book.undo(1).on_top == () and same(book, pair[1:])


def test_an_edit_after_a_merge_goes_on_as_if_there_were_none(book: Ledger, lm: LM) -> None:
    plain = book.stack()
    book.compact()
    book.apply(REQUESTS[:1], method="ft-m", settings=WEIGHTS, mode="continual", force=True)
    other = Ledger.open(book.folder.parent / "other", lm)
    other.apply_patches(plain, force=True)
    other.apply(REQUESTS[:1], method="ft-m", settings=WEIGHTS, mode="continual", force=True)
    assert book.stack()[-1].id == other.stack()[-1].id


def test_patches_with_running_state_are_not_merged(lm: LM, tmp_path: Path) -> None:
    from dataclasses import replace

    ledger = Ledger.open(tmp_path / "book", lm)
    ledger.apply(REQUESTS[:2], method="lora", settings={"steps": 1, "rank": 1}, force=True)
    first, second = ledger.stack()
    other = Ledger.open(tmp_path / "other", lm)
    other.apply_patches([replace(first, state={"keys": torch.ones(2)}), second], force=True)
    assert other.compact().merges == () and len(other.stack()) == 2
