"""Patches that go on from others: what is taken off stays off, and what runs underneath is seen as it runs."""

from __future__ import annotations

import pytest
import torch
from families import lm
from test_laws import METHODS, asked, editor

from errata.bank import live
from errata.methods.wise_training import Job, Training
from errata.read import read, up_to
from errata.tail import Tail


@pytest.mark.parametrize("method", METHODS)
def test_taking_off_a_patch_in_between_brings_none_back_that_a_later_one_holds(method: str) -> None:
    base, stack = lm("llama"), ()
    for request in asked(method):
        stack = (*stack, editor(method).edit(base, [request], on=stack))  # type: ignore[attr-defined]
    first, middle, last = stack
    together = live(stack)
    base.attach(*stack)
    base.detach(middle.id)
    assert live(base.stack) == ((first, last) if len(together) == 3 else (last,))
    base.detach(last.id)
    assert live(base.stack) == (first,)
    assert set(last.replaces) == ({first.id, middle.id} if len(together) == 1 else set())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wise_reads_its_own_tokens_behind_what_stands_in_front(family: str) -> None:
    base = lm(family, torch.float64)
    on = (editor("ice").edit(base, asked("ice")[1:2]),)  # type: ignore[attr-defined]
    job = Job(editor("wise"), base, on, Tail)
    training = Training(job.editor, base, [job.texts(asked("wise")[0])], job.memories, job.site, job.shape, job.act, job.under, Tail)
    texts = training.texts[0]
    rows = [up_to(row, at) for row in (*texts.edit, *texts.unrelated) for at in range(1, len(row.ids))]  # BOS stands before the context
    real = training.read["share"][0].new_tensor([t for row in (*texts.edit, *texts.unrelated) for t in range(len(row.ids))]) > 0
    x, o = read(base, rows, [job.site], on=on)[job.site]
    torch.testing.assert_close(training.read["x"][0][real], x)
    torch.testing.assert_close(training.read["o"][0][real], o)
