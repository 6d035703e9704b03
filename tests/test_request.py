"""Requests, probes, cases and the JSON Lines reader: what is accepted, and what every kind of bad input is told."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import ErrataError, InputError
from errata.request import Case, EditRequest, Probe, read_requests, write_requests

GOOD = {"prompt": "The capital of France is", "target": "Rome", "subject": "France", "old": "Paris"}
QUIET = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


# name -> (second line of the file, what the message says after "file:2: ")
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{prompt: 1}", r"not valid JSON: .*each line holds one object"),
    "cut off": (b'{"prompt": "a", "target": ', r"not valid JSON"),
    "two objects": (line() + line(), r"not valid JSON: Extra data"),
    "not UTF-8": (b'{"prompt": "\xff", "target": "b"}', r"not UTF-8 at byte 12; save the file as UTF-8"),
    "NaN": (b'{"prompt": "a", "target": NaN}', r"NaN is not a JSON value"),
    "Infinity": (b'{"prompt": "a", "target": -Infinity}', r"-Infinity is not a JSON value"),
    "nested too deep": (b"[" * 100_000, r"not valid JSON"),
    "a number": (b"7", r"expected an object like .* found int"),
    "a list": (b'["a", "b"]', r"expected an object like .* found list"),
    "null": (b"null", r"expected an object like .* found NoneType"),
    "no prompt": (b'{"target": "b"}', r"key 'prompt' is missing"),
    "no target": (b'{"prompt": "a"}', r"key 'target' is missing"),
    "unknown key": (line(answer="x"), r"unknown key 'answer'; known keys are prompt, target, subject"),
    "prompt a number": (line(prompt=3), r"prompt must be a text, not int"),
    "prompt null": (line(prompt=None), r"prompt must be a text, not NoneType"),
    "prompt blank": (line(prompt="  \n"), r"prompt is empty; give at least one word"),
    "target empty": (line(target=""), r"target is empty"),
    "target a list": (line(target=["Rome"]), r"target must be a text, not list"),
    "subject elsewhere": (line(subject="Spain"), r"subject 'Spain' does not occur in prompt 'The capital of France is'; spell it as"),
    "subject part of a word": (line(subject="Franc"), r"subject 'Franc' is a part of a word of prompt .*'France'"),
    "subject blank": (line(subject=" "), r"subject is empty"),
    "old a bool": (line(old=True), r"old must be a text, not bool"),
    "paraphrases a text": (line(paraphrases="abc"), r"paraphrases must be a list, not str"),
    "paraphrases null": (line(paraphrases=None), r"paraphrases must be a list, not NoneType"),
    "paraphrase a number": (line(paraphrases=["a", 1]), r"paraphrases\[1\] must be a text, not int"),
    "paraphrase blank": (line(paraphrases=[""]), r"paraphrases\[0\] is empty"),
    "unrelated an object": (line(unrelated={"a": "b"}), r"unrelated must be a list, not dict"),
    "unrelated of texts": (line(unrelated=["ab"]), r"unrelated\[0\] must be a pair \[prompt, answer\]"),
    "unrelated of three": (line(unrelated=[["a", "b", "c"]]), r"unrelated\[0\] must be a pair"),
    "unrelated answer a number": (line(unrelated=[["a", "b"], ["a", 1]]), r"unrelated\[1\] answer must be a text, not int"),
    "unrelated prompt blank": (line(unrelated=[[" ", "b"]]), r"unrelated\[0\] prompt is empty"),
    "given twice": (line(prompt="First of France", target="one"), r"the same request stands at .*edits\.jsonl:1; remove one"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_with_file_and_line(name: str, tmp_path: Path) -> None:
    bad, says = BAD_LINES[name]
    path = tmp_path / "edits.jsonl"
    path.write_bytes(line(prompt="First of France", target="one") + b"\n" + bad + b"\n")
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:2: {says}") as caught:
        read_requests(path)
    assert caught.value.exit_code == 2


# Values JSON can hold and the reader meets with a bare Python error as of this commit.  strict: a mended reader must drop the mark.
UNNAMED: dict[str, tuple[bytes, str]] = {
    "unrelated of numbers": (line(unrelated=[1]), r"unrelated\[0\] must be a pair"),
    "unrelated of null": (line(unrelated=[None]), r"unrelated\[0\] must be a pair"),
    "unrelated of objects": (line(unrelated=[{"prompt": "a", "answer": "b"}]), r"unrelated\[0\] must be a pair"),
    "a huge number": (b'{"prompt": "a", "target": ' + b"1" * 5000 + b"}", r""),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_bad_line_that_python_refuses(name: str, tmp_path: Path) -> None:
    bad, says = UNNAMED[name]
    path = tmp_path / "edits.jsonl"
    path.write_bytes(b"\n" + bad)
    with pytest.raises(InputError, match=rf"edits\.jsonl:2: {says}"):
        read_requests(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"holds no request; write one JSON object a line"),
        (b"\n \n\n", r"holds no request"),
        (b'[\n{"prompt": "a", "target": "b"}\n]', r":1: not valid JSON: .*the file is one JSON list; write one object a line"),
    ],
)
def test_bad_file(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_requests(path)


def test_no_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl: no such file"):
        read_requests(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"cannot be read .*give a JSON Lines file"):
        read_requests(tmp_path)


def test_blank_lines_crlf_and_bom_are_read_past(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n\n" + line(target="Oslo") + b"\r\n")
    assert [r.target for r in read_requests(path)] == ["Rome", "Oslo"]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(line() + b"\n\n\n7\n")
    with pytest.raises(InputError, match=r":4: expected an object"):
        read_requests(path)


def test_prompt_and_target_positional_texts_are_not_lists() -> None:
    with pytest.raises(InputError, match="are lists, not texts"):
        EditRequest("a", "b", paraphrases="abc")  # type: ignore[arg-type]


def test_id_depends_on_every_field_and_on_nothing_else() -> None:
    variants = [
        EditRequest("The capital of France is", "Rome"),
        EditRequest("The capital of France is", "Oslo"),
        EditRequest("The capital of France is", "Rome", subject="France"),
        EditRequest("The capital of France is", "Rome", old="Paris"),
        EditRequest("The capital of France is", "Rome", paraphrases=("x",)),
        EditRequest("The capital of France is", "Rome", unrelated=(("x", "y"),)),
    ]
    assert len({r.id for r in variants}) == len(variants)
    assert EditRequest.from_dict(variants[5].to_dict()).id == variants[5].id
    # Written out, so that a patch of today is still matched to its request by a later version.
    content = b'{"prompt": "The capital of France is", "target": "Rome"}'
    assert variants[0].id == hashlib.sha256(content).hexdigest()[:16]


WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@QUIET
@given(
    st.builds(
        EditRequest,
        prompt=WORDS,
        target=WORDS,
        old=st.none() | WORDS,
        paraphrases=st.lists(WORDS, max_size=2),
        unrelated=st.lists(st.tuples(WORDS, WORDS), max_size=2),
    )
)
def test_write_then_read_is_the_same(tmp_path_factory: pytest.TempPathFactory, edit: EditRequest) -> None:
    path = tmp_path_factory.mktemp("round") / "edits.jsonl"
    write_requests(path, [edit])
    assert read_requests(path) == [edit]


def reads_or_explains(path: Path, content: bytes) -> bool:
    """Requests, or an error of errata's that names the file; anything else is raised."""
    path.write_bytes(content)
    try:
        requests = read_requests(path)
    except ErrataError as error:
        return str(path) in str(error)
    return bool(requests) and all(isinstance(r, EditRequest) for r in requests)


@QUIET
@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from([b"{", b"}", b'"prompt"', b":", b"[", b",", b'"a"', b"\n", b"\xff", line()])).map(b"".join)
)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    assert reads_or_explains(tmp_path_factory.getbasetemp() / "bytes.jsonl", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.just("a b") | JSON,
        "target": st.just("c") | JSON,
        "subject": st.just("a") | JSON,
        "old": JSON,
        "paraphrases": JSON,
        "unrelated": JSON | st.lists(st.lists(JSON, max_size=3) | st.text(max_size=2), max_size=2),
        "other": JSON,
    },
)


@QUIET
@given(st.lists(RECORDS | JSON, max_size=3))
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    content = "\n".join(json.dumps(r) for r in records).encode()
    assert reads_or_explains(tmp_path_factory.getbasetemp() / "json.jsonl", content)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "a"), "probe kind is empty"),
        (("rewrite", " "), "probe prompt is empty"),
        (("rewrite", "a", ""), "probe target is empty"),
        (("rewrite", 3), "probe prompt must be a text, not int"),
        (("rewrite", "a", 3), "probe target must be a text, not int"),
    ],
)
def test_bad_probe(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Probe(*arguments)


def test_a_case_may_not_score_what_it_trains_on() -> None:
    request = EditRequest("p", "t", paraphrases=("q",), unrelated=(("u", "v"),))
    for prompt in ("q", "u"):
        with pytest.raises(InputError, match=rf"probe '{prompt}' is also training text .* may not be scored on what it was shown"):
            Case(request, (Probe("rephrase", prompt, "t"),))
    with pytest.raises(InputError, match="of kind 'rephrase' is the edited prompt itself; call it 'rewrite'"):
        Case(request, (Probe("rephrase", "p", "t"),))
    assert Case(request, (Probe("rewrite", "p", "t"), Probe("neighbour", "n"))).probes[1].target is None


def test_contrast_is_no_part_of_what_a_fact_is() -> None:
    plain = EditRequest("The capital of France is", "Lyon", "France")
    told = EditRequest(plain.prompt, plain.target, plain.subject, contrast=(("The capital of Spain is", "Madrid"),))
    assert told.id == plain.id and told != plain
    assert EditRequest.from_dict(told.to_dict()) == told
    with pytest.raises(InputError, match=r"contrast\[0\] must be a pair"):
        EditRequest("a b", "c", contrast=("d e",))  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["The capital of Spain is", "Which city governs spain?", "“Spain”, its capital:"])
def test_what_contrast_trains_on_scores_nothing(asked: str) -> None:
    told = EditRequest("The capital of France is", "Lyon", "France", contrast=(("The capital of Spain is", "Madrid"),))
    with pytest.raises(InputError, match="train"):
        Case(told, (Probe("neighbour", asked),))
    Case(told, (Probe("neighbour", "Which city governs Spainland?"),))  # another word
