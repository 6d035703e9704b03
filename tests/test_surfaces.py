"""Surfaces: other names keep to their rules, shuffles keep their tokens, passages never meet, and the halves never mix."""

from __future__ import annotations

import math
from typing import Any

import pytest

import errata
from errata.core.model import LM
from errata.core.tokens import subject_span
from errata.errors import InputError
from errata.request import Case, EditRequest, Probe, fill
from errata.text import surfaces

SUBJECTS = ["Danielle Darrieux", "Andorra", "Kingdom of Iraq", "The Beatles", "Paris (band)", "São Paulo", "東京", "Deborah's Dream", "3M"]
REQUEST = EditRequest("The mother tongue of Danielle Darrieux is", "English", "Danielle Darrieux", old="French")


@pytest.fixture(scope="module")
def lm() -> LM:
    return errata.load("almanac")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_variants_are_other_names_in_two_halves(subject: str) -> None:
    found = surfaces.variants(subject)
    assert len(found) >= (10 if " " in subject else 8 if subject.casefold() != subject.upper() else 5)
    assert len(set(found)) == len(found) and subject not in found
    assert all(name == name.strip() and name for name in found)
    seen, unseen = surfaces.halves(found)
    assert (*seen, *unseen) == found and 0 <= len(seen) - len(unseen) <= 1


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ("Danielle Darrieux", {"Darrieux, Danielle", "D. Darrieux", "Danielle D.", "DANIELLE DARRIEUX", '"Danielle Darrieux"'}),
        ("Thomas Joannes Stieltjes", {"Stieltjes, Thomas Joannes", "T. J. Stieltjes", "Thomas Joannes S."}),
        ("Kingdom of Iraq", {"Iraq's Kingdom", "the one named Kingdom of Iraq"}),
        ("Deborah's Dream", {"the Dream of Deborah"}),
        ("Paris (band)", {"Paris, the band"}),
        ("The Beatles", {"Beatles"}),
        ("Sir Alan Turing", {"Alan Turing", "A. Turing"}),
    ],
)
def test_rules(subject: str, names: set[str]) -> None:
    assert names <= set(surfaces.variants(subject))


def test_each_kind_of_rule_is_in_both_halves() -> None:
    seen, unseen = surfaces.halves(surfaces.variants("Danielle Darrieux"))
    for half in (seen, unseen):
        assert any("Danielle Darrieux" in name and name != "Danielle Darrieux" for name in half)
        assert any("danielle darrieux" not in name.casefold() for name in half), "a name whose own words are rearranged"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_shuffled_are_permutations_of_the_tokens(lm: LM, subject: str) -> None:
    found = surfaces.shuffled(lm, subject)
    sentence = f"the {subject}"
    start, end = subject_span(lm.tokenizer, sentence, subject, occurrence=-1)
    assert len(found) <= min(10, math.factorial(end - start) - 1)
    assert len(set(found)) == len(found) and subject not in found
    assert all(sorted(text.replace(" ", "")) == sorted(subject.replace(" ", "")) for text in found)
    assert found == surfaces.shuffled(lm, subject), "the same seed draws the same"
    assert surfaces.shuffled(lm, subject, most=2) == found[:2]


def test_shuffled_counts(lm: LM) -> None:
    assert surfaces.shuffled(lm, "France") == ()
    assert len(surfaces.shuffled(lm, "Danielle Darrieux")) == 10
    assert sorted(surfaces.shuffled(lm, "Kingdom of Iraq")) == sorted(
        ("Kingdom Iraq of", "of Kingdom Iraq", "of Iraq Kingdom", "Iraq Kingdom of", "Iraq of Kingdom")
    )
    assert surfaces.shuffled(lm, "Danielle Darrieux", seed=1) != surfaces.shuffled(lm, "Danielle Darrieux")


def test_passages_are_exact_and_never_overlap(lm: LM) -> None:
    by_words, by_tokens = surfaces.passages(6), surfaces.token_passages(lm, 6)
    assert [len(text.split()) for text in by_words] == [300] * 6
    counts = [len(row) for row in lm.tokenizer([t.rstrip() for t in by_tokens])["input_ids"]]
    assert all(480 <= n <= 512 for n in counts), counts
    assert all(text.endswith((". ", "! ", "? ")) for text in (*by_words, *by_tokens))
    assert surfaces.passages(5) == by_words[:5], "a longer list begins as a shorter one"
    assert not set(by_words) & set(surfaces.passages(6, seed=1))
    fives = [{tuple(words[i : i + 5]) for i in range(len(words) - 5)} for words in (t.split() for t in by_words)]
    long = [{tuple(words[i : i + 5]) for i in range(len(words) - 5)} for words in (t.split() for t in by_tokens)]
    for i, mine in enumerate(fives):
        for j in range(6):
            if i != j:
                assert len(mine & fives[j]) <= 2 and len(mine & long[j]) <= 2  # set phrases aside, no text is shared


def test_of_keeps_what_trains_from_what_scores(lm: LM) -> None:
    found = surfaces.make_surfaces(lm, REQUEST)
    assert found == surfaces.make_surfaces(lm, REQUEST)
    assert (len(found.passages_seen), len(found.passages_unseen)) == (5, 1)
    for seen, unseen in (
        (found.names_seen, found.names_unseen),
        (found.shuffled_seen, found.shuffled_unseen),
        (found.passages_seen, found.passages_unseen),
    ):
        assert seen and unseen and not set(seen) & set(unseen)
    named = EditRequest(REQUEST.prompt, "English", REQUEST.subject, aliases=("the star of Madame de…", found.names_unseen[0]))
    mine = surfaces.make_surfaces(lm, named)
    assert mine.names_seen == named.aliases and mine.names_unseen == found.names_unseen[1:]
    with pytest.raises(InputError, match="need its subject"):
        surfaces.make_surfaces(lm, EditRequest("The sky is", "green"))


@pytest.mark.parametrize(
    ("prompt", "subject", "name", "filled"),
    [
        ("X is based in", "X", "the one named X", "The one named X is based in"),
        ("Where is X?", "X", "the one named X", "Where is the one named X?"),
        ("X's seat is in", "X", "X, so named,", "X, so named's seat is in"),
        ("The seat of X is", "X", "X, so named,", "The seat of X, so named, is"),
        ("Who is X? X is", "X", "Y", "Who is Y? X is"),
        ("X is", "X", "le Dani", "le Dani is"),
    ],
)
def test_fill(prompt: str, subject: str, name: str, filled: str) -> None:
    assert fill(EditRequest(prompt, "t", subject), name) == filled == surfaces.fill(EditRequest(prompt, "t", subject), name)


def test_bad_counts(lm: LM) -> None:
    for call, says in (
        (lambda: surfaces.passages(10**6), "the bundled text has"),
        (lambda: surfaces.passages(1, words=0), "1 to 1024 words, not 0"),
        (lambda: surfaces.token_passages(lm, 1, tokens=1), "2 to 1024 tokens, not 1"),
        (lambda: fill(EditRequest("The sky is", "green"), "it"), "has no subject"),
    ):
        with pytest.raises(InputError, match=says):
            call()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aliases": "x"}, "are lists, not texts"),
        ({"aliases": ("",)}, r"aliases\[0\] is empty"),
        ({"aliases": ("x", 3)}, r"aliases\[1\] must be a text, not int"),
        ({"aliases": ("x",), "subject": None}, "give the key 'subject'"),
        ({"aliases": ("x", "Danielle Darrieux")}, r"aliases\[1\] is the subject"),
    ],
)
def test_bad_aliases(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        EditRequest(**{"prompt": REQUEST.prompt, "target": "English", "subject": REQUEST.subject, **changes})


def test_aliases_round_trip_and_leave_old_ids_alone() -> None:
    assert REQUEST.id == "e94ae289862b2c23" and "aliases" not in REQUEST.to_dict()
    named = EditRequest(REQUEST.prompt, "English", REQUEST.subject, aliases=["D. D."])  # type: ignore[arg-type]
    assert named.aliases == ("D. D.",) and EditRequest.from_dict(named.to_dict()) == named
    with pytest.raises(InputError, match="aliases must be a list, not str"):
        EditRequest.from_dict({"prompt": "a", "target": "b", "aliases": "c"})


def test_a_prompt_under_an_alias_scores_only_as_seen() -> None:
    named = EditRequest(REQUEST.prompt, "English", REQUEST.subject, aliases=("D. D.",))
    prompt = "The mother tongue of D. D. is"
    Case(named, (Probe("subject_seen", prompt, "English"),))
    with pytest.raises(InputError, match="is also training text"):
        Case(named, (Probe("alias", prompt, "English"),))
