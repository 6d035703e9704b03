"""Two stacks side by side, against plain forward passes over whole texts."""

from __future__ import annotations

import math

import pytest
import torch
from families import SENTENCES
from families import lm as trained
from made import made
from test_running_state import hybrid

from errata.core.bank import Stack
from errata.core.model import LM
from errata.score import teacher_forcing
from errata.score.compare import Completion, compare

PROMPTS = [p for p, _ in SENTENCES[:5]]
ANSWERS = [["Rome"], [], ["Madrid", "Tokyo and Paris"], ["French"], []]


def checked(lm: LM, prompt: str, said: Completion, under: Stack, asked: list[str]) -> None:
    assert said.ids == tuple(lm.generate_ids([prompt], stacks=[under], max_new_tokens=5)[0])
    (row,) = lm.encode([prompt])
    logits = lm.logits(lm.batch([type(row)((*row.ids, *said.ids), len(row.ids))]), [under])[0, len(row.ids) - 1 :]
    for token, value, at in zip(said.ids, said.logprobs, torch.log_softmax(logits.double(), -1), strict=False):
        assert value == pytest.approx(float(at[token]), abs=1e-3)
    assert len(said.logprobs) == len(said.ids) and set(said.likely) == set(asked)
    for text in asked:
        (alone,) = teacher_forcing.score_full_texts(lm, lm.encode([prompt], [text]), [under], [0])
        assert said.likely[text] == pytest.approx(math.exp(-alone.nll * len(alone.target)), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "hybrid"])
def test_sides_are_what_each_stack_says_alone(family: str) -> None:
    lm = hybrid() if family == "hybrid" else trained(family)
    sides: tuple[Stack, Stack] = ((), (made(lm, 1),))
    for one, prompt, asked in zip(compare(lm, PROMPTS, sides, 5, ANSWERS), PROMPTS, ANSWERS, strict=True):
        assert one.prompt == prompt
        for said, under in zip((one.before, one.after), sides, strict=True):
            checked(lm, prompt, said, under, asked)
        p, q = (torch.softmax(lm.logits(lm.batch(lm.encode([prompt])), [side])[0, -1].double(), -1) for side in sides)
        assert one.moved == pytest.approx(0.5 * float((p - q).abs().sum()), abs=1e-4) and one.moved > 1e-4
        assert one.changed == (one.before.text != one.after.text)


def test_more_prompts_than_one_batch_holds_answer_as_they_do_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = trained("llama")
    sides: tuple[Stack, Stack] = ((), (made(lm, 1),))
    together = compare(lm, PROMPTS, sides, 3, ANSWERS)
    monkeypatch.setattr("errata.score.compare.AT_ONCE", 4)  # two prompts at a time, two sides each
    apart = compare(lm, PROMPTS, sides, 3, ANSWERS)
    assert [(c.prompt, c.before.ids, c.after.ids, [*c.after.likely]) for c in apart] == [
        (c.prompt, c.before.ids, c.after.ids, [*c.after.likely]) for c in together
    ]


def test_an_answer_that_shares_a_token_with_its_prompt_runs_as_a_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = trained("llama")
    real, prompt = lm.encode, PROMPTS[0]

    def shifted(prompts, targets=None, **how):  # type: ignore[no-untyped-def]  # the target begins a token earlier than the prompt ends
        rows = real(prompts, targets, **how)
        return (
            rows
            if targets is None
            else [type(r)((*r.ids[: r.prompt_length - 1], 5, *r.ids[r.prompt_length :]), r.prompt_length) for r in rows]
        )

    monkeypatch.setattr(lm, "encode", shifted)
    (one,) = compare(lm, [prompt], ((), ()), 2, [["Rome"]])
    (alone,) = teacher_forcing.score_full_texts(lm, shifted([prompt], ["Rome"]), [()], [0])
    assert one.before.likely["Rome"] == one.after.likely["Rome"] == pytest.approx(math.exp(-alone.nll * len(alone.target)), rel=1e-5)
