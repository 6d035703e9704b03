"""Perplexity: the model's own loss on one chunk, every stack in one call, and ops that see text as output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import SENTENCES, lm
from test_score import CASES, EDITOR

from errata.core.model import LM
from errata.errors import InputError
from errata.score import perplexity as module
from errata.score.perplexity import Perplexity, perplexity

TEXT = "\n".join(f"{p} {t}." for p, t in SENTENCES)


def ids(base: LM) -> list[int]:
    return [i for line in TEXT.split("\n") for i in base.tokenizer(line, add_special_tokens=False)["input_ids"]]


def loss(base: LM, row: list[int]) -> float:
    whole = torch.tensor([[base.tokenizer.bos_token_id, *row]])
    with torch.no_grad():
        return float(base.hf(input_ids=whole, labels=whole).loss)


def test_one_chunk_is_the_models_own_loss() -> None:
    base = lm("llama", torch.float64)
    (found,) = perplexity(base, TEXT, tokens=20, length=20)
    assert found.value == pytest.approx(math.exp(loss(base, ids(base)[:20])), rel=1e-6)
    assert found.tokens == 20
    read, used = 0, 0
    for line in TEXT.split("\n"):
        read, used = read + len(base.tokenizer(line, add_special_tokens=False)["input_ids"]), used + len(line.encode())
        if read >= 20:
            break
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) * read / used)


def test_chunks_are_averaged_by_token_and_a_short_text_is_one() -> None:
    base = lm("llama", torch.float64)
    every = ids(base)
    (found,) = perplexity(base, TEXT, length=9)
    rows = [every[i : i + 9] for i in range(0, len(every) - 8, 9)]
    assert found.nll == pytest.approx(sum(loss(base, r) for r in rows) / len(rows), rel=1e-6)
    assert found.tokens == 9 * len(rows)
    (short,) = perplexity(base, "In Rome people speak Italian.", length=40)
    row = base.tokenizer("In Rome people speak Italian.", add_special_tokens=False)["input_ids"]
    assert short.nll == pytest.approx(loss(base, row), rel=1e-6) and short.tokens == len(row)


def test_a_text_in_one_line_is_read_no_further_than_asked() -> None:
    base = lm("llama", torch.float64)
    line = TEXT.replace("\n", " ")
    row = base.tokenizer(line, add_special_tokens=False)["input_ids"]
    (found,) = perplexity(base, line, tokens=13, length=6)
    assert found.tokens == 12 and len(row) > 24
    assert found.nll == pytest.approx((loss(base, row[:6]) + loss(base, row[6:12])) / 2, rel=1e-6)


def test_several_stacks_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama", torch.float64)
    one, two = ((p,) for p in EDITOR.edit_each(base, [c.request for c in CASES[:2]]))
    together = perplexity(base, TEXT, [(), one, two, one], length=12)
    assert together[1].nll == pytest.approx(together[3].nll)
    assert len({round(p.nll, 6) for p in together}) == 3
    for stack, found in zip([(), one, two], together, strict=False):
        assert perplexity(base, TEXT, [stack], length=12)[0].nll == pytest.approx(found.nll, abs=1e-9)
    monkeypatch.setattr(module, "NUMBERS", 1)  # a row at a time
    for few, found in zip(perplexity(base, TEXT, [(), one], length=12), together, strict=False):
        assert few.nll == pytest.approx(found.nll, abs=1e-9)
    with base.under(*one):  # what is attached stands aside
        assert perplexity(base, TEXT, length=12)[0].nll == pytest.approx(together[0].nll, abs=1e-9)


def test_text_counts_as_output_of_the_edited_model() -> None:
    """The op of ReFT runs on the prompt's last token and on answers; a row that counted as prompt would nearly hide it."""
    base = lm("llama", torch.float64)
    patch = EDITOR.edit(base, [CASES[0].request])
    row = [base.tokenizer.bos_token_id, *ids(base)[:12]]
    whole = torch.tensor([row])

    def nll(prompt_length: int) -> float:
        plan = base.plan([(patch,)], None, 1)
        plan.prompt_lengths = torch.tensor([prompt_length])
        with torch.no_grad(), base.running(plan):
            logs = base.forward(whole, torch.ones_like(whole)).logits[0].log_softmax(-1)
        return -sum(float(logs[t, row[t + 1]]) for t in range(12)) / 12

    (found,) = perplexity(base, TEXT, [(patch,)], tokens=12, length=12)
    assert found.nll == pytest.approx(nll(1), abs=1e-9)
    assert abs(found.nll - nll(13)) > 0.01


def test_without_bos_the_first_token_is_not_foretold() -> None:
    base = lm("llama", torch.float64)
    every = ids(base)[:10]
    base.tokenizer = type("NoBos", (), {"bos_token_id": None, "__call__": lambda self, lines, **how: lm("llama").tokenizer(lines, **how)})()
    (found,) = perplexity(base, TEXT, tokens=10, length=10)
    whole = torch.tensor([every])
    with torch.no_grad():
        assert found.nll == pytest.approx(float(base.hf(input_ids=whole, labels=whole).loss), rel=1e-6)
    assert found.tokens == 9


def test_too_large_for_a_number() -> None:
    assert Perplexity(1e4, 1, 1.0).value == math.inf


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"text": ""}, "no token to foretell"),
        ({"text": "\n\n"}, "no token to foretell"),
        ({"length": 1}, "at least 2"),
        ({"length": 64}, "below 64"),
        ({"tokens": 5, "length": 8}, "5 tokens are less than one row of 8"),
    ],
)
def test_what_cannot_be_measured(how: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        perplexity(lm("llama"), **{"text": TEXT, "length": 8, **how})
