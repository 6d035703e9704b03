"""The ledger's verbs: after each, the state is what it should be, by logits."""

from __future__ import annotations

import itertools
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, tokenizer
from families import lm as trained
from ledgers import PROMPTS, REQUESTS, SETTINGS, copied, logits, names, same
from tiny import FRANCE

from errata import registry
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import ErrataError, LedgerError, PatchError
from errata.ledger import Ledger
from errata.methods.subspace.baft import BaFT
from errata.request import EditRequest, read_requests

HOW = {"settings": SETTINGS, "force": True}


@pytest.fixture(scope="module")
def lm() -> LM:
    return trained("llama")


@pytest.fixture
def book(lm: LM, tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "book", lm, author="ada")


# -- apply and undo --------------------------------------------------------------------------------------------


def test_undo_in_every_order_is_never_having_applied(book: Ledger, lm: LM) -> None:
    made = book.apply(REQUESTS, **HOW, reason="a test")
    patches = {e.number: book.patch_store.read(e.patch) for e in made}
    assert len({p.id for p in patches.values()}) == 3 and same(book, patches.values())
    assert not torch.equal(logits(lm, book.stack()), logits(lm))
    for order in itertools.permutations(patches):
        numbers = dict(patches)
        fresh = Ledger.open(book.folder.parent / f"book-{'-'.join(map(str, order))}", lm)
        fresh.apply_patches(list(patches.values()), force=True)
        for number in order:
            fresh.undo(number)
            del numbers[number]
            assert same(fresh, numbers.values())
        assert torch.equal(logits(lm, fresh.stack()), logits(lm))


def test_the_record_keeps_who_when_why_and_what(book: Ledger) -> None:
    (edit,) = book.apply(REQUESTS[:1], **HOW, reason="the newspaper said so")
    book.undo(edit.number, reason="it was wrong")
    found = book.show(edit.number)
    assert (found.applied.author, found.applied.reason, found.requests) == ("ada", "the newspaper said so", (REQUESTS[0],))
    assert found.undone is not None and found.undone.reason == "it was wrong" and found.applied.time <= found.undone.time
    assert found.settings is not None and found.settings["rank"] == 2 and found.settings["last"] == 3  # all of them
    assert [e.verb for e in book.log()] == ["apply", "undo"] and book.edits() == [] and book.edits(live=False) == [found]
    with pytest.raises(LedgerError, match="edit 1 is undone already"):
        book.undo(1)
    with pytest.raises(LedgerError, match="there is no edit 7; they are 1 to 1"):
        book.show(7)


def test_a_saved_patch_comes_and_goes_and_comes_again(book: Ledger, lm: LM, good: Path) -> None:
    patch = Patch.load(good)
    (edit,) = book.apply_patches([patch], force=True)
    assert edit.settings is None and same(book, [patch])
    with pytest.raises(LedgerError, match="is live already; nothing was changed"):
        book.apply_patches([patch], force=True)
    book.undo(edit.number)
    (again,) = book.apply_patches([patch], force=True)
    assert again.number == 2 and same(book, [patch])


# -- chains ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three continual edits of BaFT."""
    ledger = Ledger.open(tmp_path_factory.mktemp("chain") / "book", lm)
    ledger.apply(REQUESTS, mode="continual", **HOW)
    return ledger.folder


def test_the_last_of_a_chain_leaves_exactly(chain: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(chain, lm, tmp_path)
    first, second, third = (book.patch_store.read(e.patch) for e in book.edits())
    assert third.replaces == (first.id, second.id) and [p.id for p in book.stack()] == [third.id]
    book.undo(3)
    assert same(book, [second])
    book.undo(2)
    assert same(book, [first])


def test_inside_a_chain_undo_refuses_or_makes_the_later_ones_again(chain: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(chain, lm, tmp_path)
    before = logits(lm, book.stack())
    with pytest.raises(LedgerError, match=r"edit 1 is inside a chain: edits 2, 3 went on from it.*--remake"):
        book.undo(1)
    assert torch.equal(logits(lm, book.stack()), before) and len(book.log()) == 3
    done = book.undo(1, remake=True)
    assert [n for n, _, _ in done.remade] == [2, 3]
    never = Ledger.open(tmp_path / "never", lm)
    never.apply(REQUESTS[1:], mode="continual", **HOW)
    assert same(book, never.stack()) and not torch.equal(logits(lm, book.stack()), before)
    assert [p.id for p in book.stack()] == [p.id for p in never.stack()]
    assert torch.equal(logits(lm, book.stack(at=3)), before)  # what was live then can still be run
    book.undo(2, remake=True)
    book.undo(3)
    assert book.stack() == ()


@pytest.mark.parametrize(
    ("how", "beside"), [({"mode": "single"}, False), ({"mode": "batched", "size": 1}, True), ({"mode": "continual"}, True)]
)
def test_what_an_edit_is_made_on(book: Ledger, lm: LM, how: dict[str, Any], beside: bool) -> None:
    """A single edit is made on the bare base, so that it can be taken back by itself; the others on what is live."""
    book.apply(REQUESTS[:1], **HOW)
    live = book.stack()
    (edit,) = book.apply(REQUESTS[1:2], **how, method="ft-m", settings={"steps": 3}, force=True)
    editor = registry.get("method", "ft-m").for_model(lm, steps=3)
    found, *wanted = (
        [op.tensors for op in p.ops]
        for p in (book.patch_store.read(edit.patch), *(editor.edit(lm, REQUESTS[1:2], on=on) for on in ((), live)))
    )
    equal = [all(torch.equal(a[k], b[k]) for a, b in zip(found, one, strict=True) for k in a) for one in wanted]
    assert equal == [not beside, beside]


def test_remaking_leaves_edits_made_alone(book: Ledger, lm: LM) -> None:
    book.apply(REQUESTS[:1], **HOW)
    book.apply(REQUESTS[1:2], mode="continual", method="ft-m", settings={"steps": 3}, force=True)
    book.apply(REQUESTS[2:], **HOW)
    kept = book.show(3).patch
    done = book.undo(1, remake=True)
    assert [n for n, _, _ in done.remade] == [2] and book.show(3).patch == kept
    plain = Ledger.open(book.folder.parent / "plain", lm)
    plain.apply(REQUESTS[1:2], mode="continual", method="ft-m", settings={"steps": 3}, force=True)
    assert same(book, [*plain.stack(), book.patch_store.read(kept)])


def test_undo_says_what_was_made_on_top(book: Ledger) -> None:
    book.apply(REQUESTS[:2], mode="continual", method="ft-m", settings={"steps": 2}, force=True)
    assert book.undo(1).on_top == (2,)


def test_a_saved_patch_that_holds_what_would_be_made_again_is_not_left_behind(book: Ledger, lm: LM) -> None:
    """It holds not the edit that is taken back, but one on top of that: made again, that one would not be the one it went on from."""
    book.apply(REQUESTS[:1], mode="continual", method="ft-m", settings={"steps": 2}, force=True)
    book.apply(REQUESTS[1:2], mode="continual", method="baft", settings=SETTINGS, force=True)
    saved = BaFT.for_model(lm, **SETTINGS).edit(lm, [REQUESTS[2]], on=book.stack())
    assert saved.replaces == (book.show(2).patch,)
    book.apply_patches([saved], force=True)
    before = [e.patch for e in book.edits()]
    with pytest.raises(LedgerError, match=r"edit 3 was brought in as a saved patch that holds .* would be made again; undo edit 3 first"):
        book.undo(1, remake=True)
    assert [e.patch for e in book.edits()] == before


def test_a_saved_patch_that_holds_an_edit_cannot_be_made_again(chain: Path, lm: LM, tmp_path: Path) -> None:
    source = copied(chain, lm, tmp_path)
    first, second = (source.patch_store.read(e.patch) for e in source.edits()[:2])
    book = Ledger.open(tmp_path / "other", lm)
    book.apply_patches([first, second], force=True)
    assert [e.requests for e in book.edits()] == [(REQUESTS[0],), (REQUESTS[1],)]  # what each added
    with pytest.raises(LedgerError, match="edit 2 was brought in as a saved patch that holds edit 1"):
        book.undo(1, remake=True)
    assert same(book, [second])
    for patches in ([second], [first]), ([second, first],):
        other = Ledger.open(tmp_path / f"book-{len(patches)}", lm)
        with pytest.raises(LedgerError, match="would change nothing"):
            for part in patches:
                other.apply_patches(part, force=True)


# -- what is odd about new facts -------------------------------------------------------------------------------


def test_duplicates_contradictions_and_known_facts_are_said_before_editing(book: Ledger, lm: LM) -> None:
    rome = EditRequest(FRANCE, "Rome", "France", paraphrases=("France has the capital",))
    with pytest.raises(LedgerError, match=r"nothing was edited.*the model as it is now answers 'Madrid.?' already"):
        book.apply([EditRequest("The capital of Spain is", "Madrid")], settings=SETTINGS)
    book.apply([rome], settings={**SETTINGS, "steps": 40, "rank": 4})
    before, events = logits(lm, book.stack()), len(book.log())
    for request, text in (
        (EditRequest("the capital of France is ", "rome"), "edit 1 writes 'Rome' after .* already"),
        (EditRequest("France has the capital", "Madrid"), r"edit 1 writes 'Rome' .*; undo it first \(`errata ledger undo 1`\)"),
    ):
        with pytest.raises(LedgerError, match=f"nothing was edited.*{text}.*--force"):
            book.apply([request], settings=SETTINGS)
    with pytest.raises(LedgerError, match="another new request writes 'Tokyo'"):
        book.apply([EditRequest("Say", "Tokyo"), EditRequest("Say", "Paris")], settings=SETTINGS)
    assert torch.equal(logits(lm, book.stack()), before) and len(book.log()) == events
    for mode in ("continual", "batched"):
        twice = [EditRequest("Say", "Tokyo"), EditRequest("Say", "Paris")]
        made = Ledger.open(book.folder.parent / mode, lm).apply(twice, settings=SETTINGS, mode=mode, force=True)
        assert [r.target for e in made for r in e.requests] == ["Tokyo", "Paris"], "what is forced is made, in one call as in two"
    assert [f.kind for f in book.findings([EditRequest(FRANCE, "Madrid")])] == ["contradiction"]
    book.apply([EditRequest(FRANCE, "Madrid")], settings=SETTINGS, force=True)
    assert len(book.edits()) == 2


# -- blame, diff, check ----------------------------------------------------------------------------------------

STRONG = {"settings": {**SETTINGS, "steps": 60, "rank": 4}, "force": True}


def test_blame_finds_the_edit_and_says_ties(book: Ledger, lm: LM) -> None:
    assert book.blame(FRANCE).verdict == "No edit is live."
    book.apply(REQUESTS[:2], **STRONG)
    found = book.blame(FRANCE)
    assert (found.base, found.live) == ("Paris", "Rome")
    (needed,) = [p for p in found.parts if p.needed]
    assert needed.edits == (1,) and needed.off == "Paris" and needed.suffices and needed.shift > 1
    assert found.parts[0] is needed and found.verdict.startswith("Edit 1 changes this answer")
    other = book.blame("The capital of Japan is")
    assert not any(p.needed or p.suffices for p in other.parts) and other.verdict.startswith("No edit changes this answer")
    book.apply([EditRequest(FRANCE, "Rome", "France")], settings={**SETTINGS, "steps": 60, "rank": 4, "seed": 1}, force=True)
    tie = book.blame(FRANCE)
    assert tie.live == "Rome" and not any(p.needed for p in tie.parts)
    assert {p.edits for p in tie.parts if p.suffices} == {(1,), (3,)} and tie.verdict.startswith("A tie: edits ")


def test_blame_in_a_chain_switches_off_what_can_be(chain: Path, lm: LM, tmp_path: Path) -> None:
    book = copied(chain, lm, tmp_path)
    found = book.blame(FRANCE)
    assert {p.edits for p in found.parts} == {(1, 2, 3), (3,)}
    last, whole = (next(p for p in found.parts if p.edits == e) for e in ((3,), (1, 2, 3)))
    assert last.alone is None and whole.off == found.base
    with lm.under(book.patch_store.read(book.show(2).patch)):
        assert last.off == lm.complete(FRANCE).strip()


def test_blame_rows_are_the_answers_one_at_a_time(book: Ledger, lm: LM) -> None:
    made = book.apply(REQUESTS, **STRONG)
    patches = [book.patch_store.read(e.patch) for e in made]
    for part in book.blame(FRANCE).parts:
        rest = [p for e, p in zip(made, patches, strict=True) if e.number not in part.edits]
        with lm.under(*rest):
            assert part.off == lm.complete(FRANCE).strip()


def test_diff_between_states(book: Ledger, lm: LM) -> None:
    book.apply(REQUESTS[:1], **STRONG)
    book.apply(REQUESTS[1:2], **STRONG)
    (france, japan) = book.diff([FRANCE, "The capital of Japan is"])
    assert (france.before, france.after, france.changed) == ("Paris", "Rome", True) and france.moved > 0.5
    with lm.under(*book.stack()):
        after = torch.softmax(lm.logits(lm.batch(lm.encode([japan.prompt])))[0, -1].double(), -1)
    base = torch.softmax(lm.logits(lm.batch(lm.encode([japan.prompt])))[0, -1].double(), -1)
    assert japan.moved == pytest.approx(0.5 * float((after - base).abs().sum()), abs=1e-5)
    (same_,) = book.diff([FRANCE], 2, "live")
    assert not same_.changed and same_.moved < 1e-6
    (older,) = book.diff([REQUESTS[1].prompt], 1, "2")
    assert older.changed and older.after == "Madrid"
    with pytest.raises(LedgerError, match="there is no event 9; the last is 2"):
        book.diff([FRANCE], 9)
    with pytest.raises(ErrataError, match="neither base, live nor the number of an event"):
        book.diff([FRANCE], "yesterday")


def test_check_names_what_a_later_edit_broke(book: Ledger) -> None:
    book.apply(REQUESTS[:1], **STRONG)
    assert book.check().sound
    for target in ("Rome", "Tokyo"):
        book.apply([EditRequest(FRANCE, target)], mode="continual", **STRONG)
    book.apply([EditRequest("In Rome people speak", "Tokyo")], settings={"steps": 1, "rank": 1}, force=True)
    assert [(h.status, h.by) for h in book.check().held] == [("broken", 3), ("broken", 3), ("right", None), ("never", None)]


# -- what the database refuses ---------------------------------------------------------------------------------


def test_another_model_a_newer_schema_and_foreign_folders_are_refused(book: Ledger, lm: LM, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"is of base .*, this model is"):
        Ledger.open(book.folder, LM(build("llama", seed=1), lm.tokenizer))
    with pytest.raises(LedgerError, match="holds no ledger"):
        Ledger.open(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ErrataError, match="is not a ledger; it is left alone"):
        Ledger.open(tmp_path / "mine", lm)
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / "ledger.db") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(LedgerError, match="database of another program"):
        Ledger.open(tmp_path / "other", lm)
    with sqlite3.connect(book.database.path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match="version 99, this errata reads 1; update errata"):
        Ledger.open(book.folder, lm)


def test_without_a_model_the_record_reads_and_undo_works(book: Ledger, lm: LM) -> None:
    book.apply(REQUESTS[:2], **HOW)
    second = book.patch_store.read(book.show(2).patch)
    plain = Ledger.open(book.folder)
    plain.undo(1)
    assert same(book, [second])
    with pytest.raises(LedgerError, match="needs the model"):
        plain.apply(REQUESTS[:1])


def test_a_patch_of_another_base_is_refused(book: Ledger) -> None:
    from errata.editing import edit

    other = edit(LM(build("llama", seed=1), tokenizer()), FRANCE, "Rome", rank=2, steps=1)
    with pytest.raises(PatchError, match="was made for base"):
        book.apply_patches([other])
    assert book.log() == [] and names(book) == []


# -- export ----------------------------------------------------------------------------------------------------


def test_export_is_what_ask_and_edit_read(book: Ledger, lm: LM, tmp_path: Path) -> None:
    from errata.commands import files

    book.apply(REQUESTS[:2], **HOW)
    out = book.export(tmp_path / "out")
    stack = files.load_patches([str(tmp_path / "out")])
    assert [p.id for p in stack] == [p.id for p in book.stack()] and same(book, stack)
    assert read_requests(tmp_path / "out" / "requests.jsonl") == REQUESTS[:2]
    assert out.adapter is None and "no change of weights" in out.why_not
    with pytest.raises(ErrataError, match="exists already; it is left alone"):
        book.export(tmp_path / "out")


def test_export_writes_an_adapter_of_weight_changes(book: Ledger, lm: LM, tmp_path: Path) -> None:
    book.apply(REQUESTS[:2], method="lora", settings={"steps": 3, "rank": 2}, force=True)
    out = book.export(tmp_path / "out")
    assert out.adapter == tmp_path / "out" / "lora"
    assert json.loads((out.adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (out.adapter / "adapter_model.safetensors").is_file() and len(PROMPTS) == 8
