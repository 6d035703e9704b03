"""Reading answers as people do: a text begins with an answer, or holds it, at the ends of words."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from errata.score.match import contains, exact_match, first_word, normalise, starts

TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30) | st.text("aAnthe .,'’15LyonsÉ東京ก", max_size=30)
WORDS = st.lists(st.sampled_from(["lyon", "Lyon", "a", "The", "an", "15", "1,5", "東京", "d'or", "Vitamin", "s"]), max_size=5).map(" ".join)
ANY = TEXTS | WORDS


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Lyon, a city in France", "Lyon", True),
        (" Lyon", "lyon.", True),
        ("“Lyon” is", "Lyon", True),
        ("Lyons", "Lyon", False),
        ("the city of Lyon", "Lyon", False),
        ("The Hague is a city", "Hague", True),
        ("Hague is a city", "The Hague", True),
        ("the Bank of the West, San Francisco", "Bank of West", True),
        ("Lyon's mayor", "Lyon", True),
        ("McDonalds is", "McDonald's", True),
        ("Côte d'Ivoire is", "Côte d’Ivoire", True),
        ("Lyon-Villeurbanne", "Lyon", True),
        ("1,5 million", "1", False),
        ("1,5 million", "1,5", True),
        ("1,500", "1", False),
        ("15", "1,5", False),
        ("1,5", "15", False),
        ("15.", "15", True),
        ("15, then 16", "15", True),
        ("150", "15", False),
        ("10:30 in the morning", "10", False),
        ("1990-1995", "1990", True),
        ("15年", "15", True),
        ("東京都です", "東京", True),
        ("京都", "東京", False),
        ("NHKは", "NHK", True),
        ("ลอนดอนเป็น", "ลอนดอน", True),
        ("กิน", "ก", False),
        ("Сент-Луис, США", "сент луис", True),
        ("The The is a band", "The The", True),
        ("is a band", "The The", False),
        ("Vitamin A is", "Vitamin A", True),
        ("Vitamin C is", "Vitamin A", False),
        ("A.", "A", True),
        ("anything", "", False),
        ("", "", False),
        ("...", "!", False),
        ("", "Lyon", False),
    ],
)
def test_starts_by_hand(text: str, answer: str, expected: bool) -> None:
    assert starts(text, answer) is expected


def test_contains_by_hand() -> None:
    assert contains("It is in Paris, France.", "paris france")
    assert contains("ここは東京です", "東京")
    assert contains("It is The The, a band", "The The")
    assert contains("about 15, or 1,5", "1,5")
    assert not contains("about 1,5", "1")
    assert not contains("Parisian", "Paris")
    assert not contains("un-Parisian", "Paris")
    assert not contains("anything", "")


@given(ANY, ANY)
def test_equal_implies_begins_implies_contains(text: str, answer: str) -> None:
    assert not exact_match(text, answer) or starts(text, answer)
    assert not starts(text, answer) or contains(text, answer)


@given(ANY, st.sampled_from(["", ".", ", and more", " of France", "\n2", "!"]))
def test_an_answer_begins_with_itself_whatever_follows(answer: str, more: str) -> None:
    assume(normalise(answer))
    assert starts(answer + more, answer) or answer[-1:] in ".,:/" or more[:1] in ",."  # "1." + "…5" is a number that goes on


@given(WORDS, WORDS)
def test_case_and_what_follows_the_end_of_a_word_do_not_matter(text: str, answer: str) -> None:
    assert starts(text, answer) == starts(text.upper(), answer) == starts(text, f"  {answer.lower()}!")
    last = answer.casefold().split()[-1:]  # "Lyon" equals "Lyon a", as `normalise` has it, but no text with "Lyon" begins with it
    assert not starts(text, answer) or starts(f"{text} and so on", answer) or last[0] in ("a", "an", "the")


@given(ANY)
def test_nothing_begins_with_nothing(text: str) -> None:
    assert not starts(text, "") and not starts(text, "…") and not contains(text, " ")


@given(st.text("lyonspar", min_size=1, max_size=8), st.text("lyonspar", min_size=1, max_size=4))
def test_a_longer_word_does_not_begin_with_a_shorter_one(word: str, more: str) -> None:
    assume(normalise(word) == word)
    assert not starts(word + more, word)
    assert starts(f"{word} {more}", word)


def test_first_word() -> None:
    assert first_word("The Lyon, a city") == "lyon"
    assert first_word("...") == first_word("") == ""
