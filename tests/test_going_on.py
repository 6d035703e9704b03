"""Patches that go on from others: what is taken off stays off, and what runs underneath is seen as it runs."""

from __future__ import annotations

import pytest
from families import lm
from test_laws import METHODS, asked, editor

from errata.bank import live


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
