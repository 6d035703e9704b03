"""What runs by default of a large product shows all that should meet, and slow tests run the rest."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_laws
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CHOSEN, MEET, METHODS, PRODUCT
from pairwise import covering

LAWS = {
    "undo": test_laws.test_an_edit_changes_the_answer_and_undo_is_exact,
    "rows": test_laws.test_rows,
    "padding": test_laws.test_padding_cache_and_raw_calls_agree,
    "round trip": test_laws.test_round_trip,
    "independence": test_laws.test_independence,
    "tail": test_laws.test_tail_and_full_forward_reach_the_same_patch,
    "forcing": test_laws.test_forcing_behind_a_prompt_that_has_run_is_forcing_in_one_text,
}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=4), st.data())
def test_what_meets_in_the_product_meets_in_the_rows(sizes: list[int], data: st.DataObject) -> None:
    product = [tuple(map(str, row)) for row in itertools.product(*map(range, sizes))]
    rows = data.draw(st.lists(st.sampled_from(product), unique=True))
    few = covering(rows, columns := list(itertools.combinations(range(len(sizes)), 2)))
    assert few == [row for row in rows if row in few], "in their order"
    for which in columns:
        assert {tuple(row[c] for c in which) for row in few} == {tuple(row[c] for c in which) for row in rows}
    assert len(few) <= len({(which, tuple(row[c] for c in which)) for row in rows for which in columns}), "each shows something new"


def test_every_law_method_family_and_dtype_meet() -> None:
    for pair in itertools.combinations(range(4), 2):
        assert {(row[pair[0]], row[pair[1]]) for row in CHOSEN} == {(row[pair[0]], row[pair[1]]) for row in PRODUCT}
    assert {row[:2] + row[3:] for row in CHOSEN} == {row[:2] + row[3:] for row in PRODUCT}
    families = {row[2] for row in PRODUCT}
    assert len(CHOSEN) < 1.2 * len(METHODS) * len(families) < len(PRODUCT) / 8


@pytest.mark.parametrize("law", LAWS)
def test_the_law_is_held_to_the_chosen_rows_and_when_slow_to_all_others(law: str) -> None:
    (marks,) = [m for m in LAWS[law].pytestmark if m.name == "parametrize"]
    assert set(LAWS) == {row[0] for row in PRODUCT}
    width = len(marks.args[0])
    now, slow = ([p.values for p in marks.args[1] if any(m.name == "slow" for m in p.marks) == late] for late in (False, True))
    assert sorted(now) == sorted(row[1 : 1 + width] for row in CHOSEN if row[0] == law)
    assert sorted(now + slow) == sorted(row[1 : 1 + width] for row in PRODUCT if row[0] == law), "each once"
    assert {m for m, *_ in now} == set(METHODS)


def test_every_process_takes_the_same_rows() -> None:
    """Workers of xdist must collect the same tests: no order of a set, which differs from process to process, decides."""
    code = f"from pairwise import covering; print(covering({PRODUCT[::5]!r}, {MEET!r}))"
    own = {"PYTHONPATH": str(Path(__file__).parent)}
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **own, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{covering(PRODUCT[::5], MEET)}\n".encode()}
