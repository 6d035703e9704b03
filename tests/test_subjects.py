"""A subject is found in whole words, in the prompt's own casing, and at the place that is meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import families
import pytest

from errata.core.patch import Patch
from errata.core.tokens import subject_span
from errata.errors import InputError
from errata.methods.locate.text import place
from errata.request import EditRequest, fill
from errata.subjects import places
from errata.trace.facts import Fact

CAPITAL = "The capital of France is"


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        (CAPITAL, "France", [(15, 21)]),
        ("France's capital", "France", [(0, 6)]),
        ("(France)", "France", [(1, 7)]),
        ("Parisian food in Paris", "Paris", [(17, 22)]),
        ("iPhone 5S or iPhone 5", "iPhone 5", [(13, 21)]),
        ("Caf\u00e9 Flore", "Caf", []),
        ("Cafe\u0301 Flore", "Cafe", []),  # the accent is a character of its own
        ("法国的首都是", "法国", [(0, 2)]),
        ("東京タワーは", "東京タワー", [(0, 5)]),
        ("ประเทศไทย", "ไทย", [(6, 9)]),
        ("한국의 수도는", "한국", [(0, 2)]),
        ("Rome and Rome", "Rome", [(0, 4), (9, 13)]),
    ],
)
def test_a_subject_stands_where_its_whole_words_do(text: str, subject: str, found: list[tuple[int, int]]) -> None:
    assert places(text, subject) == found


@pytest.mark.parametrize("given", ["France", " France", "France ", "france", "FRANCE\n"])
def test_space_around_a_subject_and_its_casing_change_nothing(given: str) -> None:
    assert EditRequest(CAPITAL, "Lyon", given) == EditRequest(CAPITAL, "Lyon", "France")
    assert Fact(CAPITAL, given).subject == "France"


def test_a_part_of_a_word_is_refused_and_the_word_is_named() -> None:
    with pytest.raises(InputError, match=r"part of a word of prompt .* perhaps 'France'"):
        EditRequest(CAPITAL, "Lyon", "Franc")
    with pytest.raises(InputError, match="part of a word"):
        Fact(CAPITAL, "ran")
    with pytest.raises(InputError, match="does not occur"):
        EditRequest(CAPITAL, "Lyon", "Spain")


def test_where_a_subject_stands_twice_the_first_counts_or_the_one_that_is_named() -> None:
    lm = families.lm("llama")
    prompt = "Rome is old. The mayor of Rome is"
    ends = {}
    for occurrence in (1, 2, -1):
        request = EditRequest(prompt, "Ann", "Rome", occurrence=occurrence)
        ends[occurrence] = place(lm, request, [""], "", "rome", "subject_last")[0].at
        assert subject_span(lm.tokenizer, prompt, "Rome", occurrence=occurrence)[1] - 1 == ends[occurrence]
    assert ends[1] < ends[2] == ends[-1]
    assert fill(EditRequest(prompt, "Ann", "Rome", occurrence=2), "Oslo") == "Rome is old. The mayor of Oslo is"
    with pytest.raises(InputError, match=r"2 times .* no occurrence 3"):
        EditRequest(prompt, "Ann", "Rome", occurrence=3)
    with pytest.raises(InputError, match="occurrence must be 1"):
        EditRequest(prompt, "Ann", "Rome", occurrence=0)


def test_an_occurrence_is_written_and_read_and_the_first_goes_without_saying() -> None:
    second = EditRequest("Rome and Rome", "x", "Rome", occurrence=2)
    assert EditRequest.from_dict(json.loads(json.dumps(second.to_dict()))) == second
    assert "occurrence" not in EditRequest("Rome and Rome", "x", "Rome").to_dict()


def test_a_request_that_was_saved_is_read_to_the_letter(tmp_path: Path) -> None:
    """Its patch's id is a hash of it: a patch made before this rule must open still."""
    old = EditRequest.restore({"prompt": CAPITAL, "target": "Lyon", "subject": "France "})
    assert old.subject == "France "
    patch = Patch("none", {}, "0" * 16, (old,), ())
    patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").requests == (old,)
    assert EditRequest.restore(old.to_dict()).id == old.id != EditRequest(CAPITAL, "Lyon", "France").id
    part = EditRequest.restore({"prompt": CAPITAL, "target": "Lyon", "subject": "Franc", "aliases": ["Gaul"]})
    assert part.place() == (15, 20) and fill(part, "Gaul") == "The capital of Gaule is", "it is found again as it was made"
    with pytest.raises(InputError, match="part of a word"):
        replace(part, target="Paris")  # a new request is held to the rule


def test_a_part_counts_where_it_is_asked_for_and_no_whole_name_stands() -> None:
    assert places("the Nintendo DSi", "Nintendo DS") == []
    assert places("the Nintendo DSi", "Nintendo DS", parts=True) == [(4, 15)]
    assert places("Nintendo DSi, Nintendo DS", "Nintendo DS", parts=True) == [(14, 25)]
