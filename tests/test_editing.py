"""An edit that does not take says so, and what to do."""

from __future__ import annotations

import warnings

import pytest
from families import lm

import errata
from errata.errors import EditWarning

FRANCE = "The capital of France is"


def test_an_edit_that_does_not_take_says_so() -> None:
    base = lm("llama")
    with pytest.warns(EditWarning, match=r"'The capital of France is' is answered 'Paris', not 'Rome'.*errata tune .* --method ft-m"):
        patch = errata.edit(base, FRANCE, "Rome", "France", method="ft-m", steps=1, lr=1e-9)
    assert patch.requests[0].target == "Rome"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errata.edit(base, FRANCE, "Rome", "France", method="ft-m", lr=2e-2, steps=60)


def test_it_is_asked_on_top_of_what_is_attached() -> None:
    base = lm("llama")
    written = errata.edit(base, FRANCE, "Rome", "France", method="ft-m", lr=2e-2, steps=60)
    with base.under(written), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        errata.edit(base, FRANCE, "Rome", "France", method="ft-m", steps=1, lr=1e-9)  # it stands already
    assert [w for w in said if issubclass(w.category, EditWarning)] == []
