"""What stands between a prompt and its answer, as one writes it in that script, and as the request says."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import lm, tokenizer
from test_tokens import tokenizers

from errata import registry
from errata.core.tokens import encode, join
from errata.errors import InputError
from errata.request import EditRequest
from errata.score.match import starts
from errata.score.wanted import read
from errata.writing import seam


@pytest.mark.parametrize(
    ("prompt", "target", "between"),
    [
        ("The capital of France is", "Lyon", " "),
        ("法国的首都是", "里昂", ""),
        ("法国的首都是", "Lyon", ""),
        ("The Chinese name of France is", "法国", " "),
        ("問：首都はどこ？答：", "リヨン", ""),
        ("フランスの首都は", "リヨン", ""),
        ("เมืองหลวงของฝรั่งเศสคือ", "ลียง", ""),
        ("프랑스의 수도는", "리옹", " "),
        ("价格是5", "元", ""),
        ("The price is $", "5", ""),
        ("The price is 5 €", "today", " "),
        ("Write to user@", "errata.org", ""),
        ("See https://errata.org/", "docs", ""),
        ('He said "', "Lyon", ""),
        ('He said "no" and "', "Lyon", ""),
        ('He said "no"', "twice", " "),
        ("He said “", "Lyon", ""),
        ("He said «", "Lyon", ""),
        ("It is called the (", "Lyon)", ""),
        ("The answer is **", "Lyon**", ""),
        ("The twenty-", "first", ""),
        ("It was -", "Lyon", " "),
        ("x=", "5", ""),
        ("Issue #", "17", ""),
        ("It is written in C#", "and C++", " "),
        ("The dogs'", "bones", " "),
        ("It grew by 5", "%", ""),
        ("Lyon", ", which is large", ""),
        ("Lyon", "'s mayor", ""),
        ("It is built on", ".NET", " "),
        ("She said: \"it's", "'over'", " "),
    ],
)
def test_an_answer_follows_as_one_writes_it(prompt: str, target: str, between: str, tmp_path: Path) -> None:
    assert seam(prompt, target) == between
    assert join(prompt, target) == (prompt + between + target, len(prompt))
    (row,) = encode(tokenizer(), [prompt], [target])  # bytes: nothing is lost in decoding
    assert tokenizer().decode(row.target) == between + target


def test_space_that_is_written_counts() -> None:
    assert join("法国的首都是 ", "里昂")[0] == join("法国的首都是", " 里昂")[0] == "法国的首都是 里昂"
    assert join("The capital is\n", "\tLyon")[0] == "The capital is Lyon"


@pytest.mark.parametrize(("how", "text"), [("auto", "The code is X 5"), ("space", "The code is X 5"), ("none", "The code is X5")])
def test_a_request_can_say_what_stands_between(how: str, text: str, tmp_path: Path) -> None:
    request = EditRequest("The code is X", "5", join=how)
    assert join(request.prompt, request.continuation)[0] == text and request.target == "5"
    assert EditRequest.from_dict(request.to_dict()) == request and ("join" in request.to_dict()) == (how != "auto")
    for name, tok in tokenizers(tmp_path).items():
        (row,) = encode(tok, [request.prompt], [request.continuation])
        whole = list(tok(text)["input_ids"])
        assert list(row.ids) == whole[: len(row.ids)], name
    with pytest.raises(InputError, match="join must be one of auto, space, none"):
        EditRequest("a", "b", join="comma")


@pytest.mark.parametrize("method", registry.names("method"))
def test_every_method_trains_on_the_text_that_the_request_writes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No method builds prompt and target by itself: what each hands to the tokenizer ends as the request says."""
    if method in ("none",):
        return
    model = lm("llama")
    seen: list[str] = []
    inner = type(model.tokenizer).__call__

    def listening(self: object, text: object, *args: object, **more: object) -> object:
        seen.extend([text] if isinstance(text, str) else list(text))  # type: ignore[call-overload]
        return inner(self, text, *args, **more)

    monkeypatch.setattr(type(model.tokenizer), "__call__", listening)
    few = {"steps": 1} if "steps" in registry.get("method", method).__dataclass_fields__ else {}
    editor = registry.get("method", method).for_model(model, **few)
    for how, text in (("none", "France isZug"), ("space", "France is Zug")):
        seen.clear()
        editor.edit(model, [EditRequest("The capital of France is", "Zug", "France", join=how)])
        ours = [t for t in seen if "Zug" in t]
        assert ours and all(text in t for t in ours), (method, how, ours)


def test_an_answer_in_a_script_without_spaces_is_read_as_begun() -> None:
    assert starts("里昂是法国的城市", "里昂") and read("里昂。在法国", "里昂").as_wanted
    assert starts("ลียงเป็นเมือง", "ลียง") and not starts("Lyons", "Lyon")
