"""The answering loop: a row's answer does not depend on its neighbours, on when they came or on when they left."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import SENTENCES
from families import lm as trained
from made import made

from errata import registry
from errata.core.bank import Stack
from errata.core.model import LM
from errata.request import EditRequest
from errata.serve.api_errors import APIError
from errata.serve.engine import GenerationEngine
from errata.serve.metrics import Metrics
from errata.serve.options import Limits
from errata.serve.rows import IncrementalDetokenizer, OutputChunk, Row, SamplingParams

PROMPTS = [p for p, _ in SENTENCES]
QUICK = {
    "reft": {"rank": 2, "steps": 4, "lr": 0.02},
    "baft": {"rank": 2, "steps": 4, "lr": 0.02},
    "grace": {"steps": 5},
    "wise": {"steps": 3},
    "ice": {},
}
FAMILIES: dict[str, tuple[str, ...]] = {"llama": tuple(QUICK), "gemma2": ("baft", "grace")}


def stack(lm: LM, method: str) -> Stack:
    editor = registry.get("method", method).for_model(lm, **QUICK[method])
    return (editor.edit(lm, [EditRequest("The capital of France is", "Rome", "France")]),)


def alone(lm: LM, prompt: str, under: Stack, tokens: int) -> list[int]:
    return lm.generate_ids([prompt], stacks=[under], max_new_tokens=tokens, stop=())[0]


class Told(list[OutputChunk]):
    """What a row said."""

    @property
    def text(self) -> str:
        return "".join(p.text for p in self)


def row(lm: LM, prompt: str, under: Stack, index: int = 0, stream: bool = False, **how: Any) -> tuple[Row, Told]:
    told = Told()
    made = Row(index, lm.encode([prompt])[0], under, SamplingParams(**{"max_tokens": 6, **how}), told.append, stream)
    return made, told


def loop(lm: LM, arrivals: Sequence[tuple[int, Row]], limits: Limits | None = None) -> GenerationEngine:
    """Turns of the loop in this thread; each row is submitted before the turn it is given with."""
    out = GenerationEngine(lm, limits or Limits(), Metrics())
    turn = 0
    while out.num_unfinished or any(when >= turn for when, _ in arrivals):
        for when, one in arrivals:
            if when == turn:
                out.submit([one])
        out._turn(out._take())
        turn += 1
    return out


def counted(answering: GenerationEngine, name: str) -> float:
    return answering.metrics.registry.get_sample_value(name) or 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_answer_as_alone(family: str) -> None:
    """Weight-like, gated, deciding and in-context stacks and the base, arriving and leaving at any time; sliding windows too."""
    lm, draw = trained(family), random.Random(0)
    stacks: list[Stack] = [(), (made(lm, 1),), (made(lm, 2, 0, block=2), made(lm, 3, 1)), *(stack(lm, m) for m in FAMILIES[family])]
    wanted, arrivals, told = [], [], []
    for i in range(24):
        prompt, under, tokens = draw.choice(PROMPTS), stacks[i % len(stacks)], draw.choice((1, 3, 9))
        one, said = row(lm, prompt, under, max_tokens=tokens, logprobs=0)
        arrivals.append((draw.randrange(8), one))
        told.append(said)
        wanted.append("".join(lm.tokenizer.decode([t]) for t in alone(lm, prompt, under, tokens)))
    answering = loop(lm, arrivals)
    assert ["".join(t.text for t in said[-1].tokens) for said in told] == wanted
    assert counted(answering, "errata_answers_total") == 24
    rows, steps = counted(answering, "errata_batch_rows_sum"), counted(answering, "errata_batch_rows_count")
    assert rows / steps > 1.5  # they did run side by side


def test_rows_join_leave_and_lose_their_padding() -> None:
    lm = trained("llama")
    long, said = row(lm, "The capital of France is " * 7 + "The capital of France is", (), max_tokens=3)
    arrivals = [(0, long), *((turn, row(lm, PROMPTS[turn % 8], (), max_tokens=12)[0]) for turn in range(1, 9))]
    answering, wide, most = GenerationEngine(lm, Limits(), Metrics()), [], 0
    for turn in range(12):
        for when, one in arrivals:
            if when == turn:
                answering.submit([one])
        answering._turn(answering._take())
        assert len(answering._batches) <= 1  # all in one batch, every turn
        wide += [c.mask.shape[1] for c in answering._batches]
        most = max(most, sum(len(c.rows) for c in answering._batches))
        for cohort in answering._batches:
            assert all(layer.keys.shape[2] == cohort.mask.shape[1] - 1 for layer in cohort.cache.layers)
    assert most >= 6 and max(wide) > 40 and min(wide[4:]) < 25 and said[-1].finish_reason == "length"


@pytest.mark.parametrize("family", ["mistral", "gemma2", "llama"])
def test_padding_is_cut_only_where_keys_are_one_a_token(family: str) -> None:
    """A long row leaves and the padding of all others is in front: a sliding window keeps its last tokens only, so nothing may be cut."""
    lm = trained(family)
    long, _ = row(lm, "The capital of France is " * 7 + "The capital of France is", (), max_tokens=1)
    short = [row(lm, prompt, (), max_tokens=14, logprobs=0) for prompt in PROMPTS[:3]]
    assert len(long.encoded.ids) - max(len(one.encoded.ids) for one, _ in short) > 20
    loop(lm, [(0, long), *((0, one) for one, _ in short)])
    for (_, said), prompt in zip(short, PROMPTS[:3], strict=True):
        assert "".join(t.text for t in said[-1].tokens) == "".join(lm.tokenizer.decode([t]) for t in alone(lm, prompt, (), 14))


def test_a_seed_decides_whatever_runs_beside() -> None:
    lm = trained("llama")
    under = (made(lm, 1),)
    how = {"temperature": 1.5, "seed": 7, "max_tokens": 10}

    def drawn(beside: int, index: int = 0, **more: Any) -> str:
        mine, said = row(lm, PROMPTS[0], under, index, **{**how, **more})
        loop(lm, [*((0, row(lm, PROMPTS[i % 8], (), max_tokens=9, temperature=1.0)[0]) for i in range(beside)), (1, mine)])
        return said.text

    assert drawn(0) == drawn(5) and len({drawn(0, i) for i in range(4)} | {drawn(0, seed=8)}) > 3
    assert drawn(0, top_p=1e-9) == drawn(0, temperature=0.0) != drawn(0)


def test_tokens_come_as_they_are_made_and_add_up() -> None:
    lm = trained("llama")
    one, said = row(lm, PROMPTS[3], (), stream=True, max_tokens=8)  # Tokyo is spelt in pieces
    whole, all_of_it = row(lm, PROMPTS[3], (), max_tokens=8)
    loop(lm, [(0, one), (0, whole)])
    assert len(said) > 4 and said.text == all_of_it.text and len(all_of_it) == 1
    assert [p.finish_reason for p in said[:-1]] == [None] * (len(said) - 1) and said[-1].finish_reason == all_of_it[
        -1
    ].finish_reason is not None


@pytest.mark.parametrize("stream", [False, True])
def test_stops_end_an_answer_and_are_not_said(stream: bool) -> None:
    lm = trained("llama")
    one, said = row(lm, PROMPTS[3], (), stream=stream, max_tokens=12, stops=("kyo.", "nowhere"), logprobs=0)
    loop(lm, [(0, one)])
    assert said.text == " To" and said[-1].finish_reason == "stop"
    assert "".join(t.text for p in said for t in p.tokens) == " To"


def test_characters_come_whole_and_stops_are_held_back() -> None:
    tokenizer = trained("llama").tokenizer
    text = "日本 über alles …. END of it"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 25
    spoken, parts = IncrementalDetokenizer(tokenizer, [1], ("END",)), []
    for token in ids:
        spoken.add(token)
        parts.append(spoken.news(spoken.stopped))
        if spoken.stopped:
            break
    assert "".join(parts) == "日本 über alles …. " and not any("�" in p for p in parts) and len([p for p in parts if p]) > 10
    cut = IncrementalDetokenizer(tokenizer, [1], ())
    for token in ids[:2]:  # the beginning of a character, and then nothing more
        cut.add(token)
    assert cut.news(False) == "" and cut.news(True) == "�"


def test_rows_nobody_waits_for_and_late_ones_leave() -> None:
    lm = trained("llama")
    gone, silent = row(lm, PROMPTS[0], (), max_tokens=50)
    late, told = row(lm, PROMPTS[1], (), max_tokens=50)
    stays, said = row(lm, PROMPTS[2], (), max_tokens=4)
    answering = GenerationEngine(lm, Limits(), Metrics())
    answering.submit([gone, late, stays])
    answering._turn(answering._take())
    gone.cancelled, late.deadline = True, 0.0
    while answering.num_unfinished:
        answering._turn(answering._take())
    assert said[-1].finish_reason is not None and silent == [] and gone.count == late.count == 1
    assert told[-1].finish_reason == "error" and isinstance(told[-1].error, APIError) and told[-1].error.status == 504


def test_a_row_that_cannot_run_fails_alone() -> None:
    lm = trained("llama")
    broken = made(lm, 1)
    broken.ops[0].tensors["up"].resize_(0)  # type: ignore[attr-defined]
    bad, told = row(lm, PROMPTS[0], (broken,))
    good, said = row(lm, PROMPTS[1], ())
    loop(lm, [(0, bad), (0, good)])
    assert told[-1].finish_reason == "error" and said.text.strip().startswith("Rome")


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_next_to_0_is_greedy(top_p: float) -> None:
    lm = trained("llama")
    rows = [row(lm, PROMPTS[i], (), i, temperature=t, top_p=top_p) for i, t in enumerate((1e-308, 5e-324, 1e-30))]
    loop(lm, [(0, one) for one, _ in rows])
    assert [said.text for _, said in rows] == [lm.tokenizer.decode(alone(lm, p, (), 6)) for p in PROMPTS[:3]]


def test_a_row_whose_token_cannot_be_drawn_or_told_fails_alone() -> None:
    """A stack that gives NaN, and one whose client breaks in the middle; at any temperature, in one batch with others."""
    lm = trained("llama")
    broken = made(lm, 1)
    for op in broken.ops:
        op.tensors["up"].fill_(float("nan"))
    bad, told = row(lm, PROMPTS[0], (broken,), temperature=1.0)
    greedy, greedily = row(lm, PROMPTS[3], (broken,), temperature=0.0)
    deaf, _ = row(lm, PROMPTS[2], (), stream=True)
    deaf.tell = lambda piece: 1 / 0  # type: ignore[assignment, return-value]
    others = [row(lm, PROMPTS[1], (), temperature=t, max_tokens=5) for t in (0.0, 1e-9)]
    answering = loop(lm, [(0, bad), (0, greedy), (0, deaf), *((0, one) for one, _ in others)])
    assert [p.finish_reason for p in greedily] == ["error"] and "gives NaN under this stack" in str(greedily[-1].error)
    assert (
        told[-1].finish_reason == "error"
        and "the model gives NaN under this stack" in str(told[-1].error)
        and deaf.finish_reason == "error"
    )
    assert [said.text for _, said in others] == [lm.tokenizer.decode(alone(lm, PROMPTS[1], (), 5))] * 2
    assert counted(answering, "errata_answers_total") == 2


def test_what_waits_behind_full_batches_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = trained("llama")
    monkeypatch.setattr("errata.serve.engine.MAX_BATCHES", 0)  # as where so many run that cannot be put together
    (gone, silent), (late, told), (stays, _) = (row(lm, p, ()) for p in PROMPTS[:3])
    answering = GenerationEngine(lm, Limits(queue=3), Metrics())
    answering.submit([gone, late, stays])
    gone.cancelled, late.deadline = True, 0.0
    answering._turn(answering._take())
    assert answering.num_unfinished == 1 and silent == [] and isinstance(told[-1].error, APIError) and told[-1].error.status == 504
    answering.submit([row(lm, PROMPTS[3], ())[0] for _ in range(2)])  # there is room again


def test_the_queue_is_bounded_and_a_batch_too() -> None:
    lm = trained("llama")
    limits = Limits(queue=10, batch=4)
    answering = GenerationEngine(lm, limits, Metrics())
    rows = [row(lm, PROMPTS[i % 8], (), max_tokens=5)[0] for i in range(11)]
    answering.submit(rows[:10])
    with pytest.raises(APIError, match="10 answers wait or run, 10 may") as refused:
        answering.submit(rows[10:])
    assert refused.value.status == 429 and refused.value.headers["Retry-After"]
    while answering.num_unfinished:
        answering._turn(answering._take())
        assert all(len(c.rows) <= 4 for c in answering._batches)
    assert all(r.finish_reason for r in rows[:10])


def test_wide_prompts_are_not_padded_into_one_batch() -> None:
    lm = trained("llama")
    answering = GenerationEngine(lm, Limits(width=60), Metrics())
    answering.submit([row(lm, "The capital of " * 6 + "Japan is", (), max_tokens=3)[0] for _ in range(4)])
    assert len(answering._take()) < 4


def test_neighbours_change_logits_in_the_last_bits_only() -> None:
    lm = trained("llama")
    under = (made(lm, 1),)
    mine, said = row(lm, PROMPTS[0], under, max_tokens=5, logprobs=1)
    loop(lm, [(0, mine), *((i % 3, row(lm, PROMPTS[i % 8], (made(lm, i),), max_tokens=8)[0]) for i in range(2, 12))])
    ids = alone(lm, PROMPTS[0], under, 5)
    (encoded,) = lm.encode([PROMPTS[0]])
    batch = lm.batch([type(encoded)((*encoded.ids, *ids), len(encoded.ids))])
    likely = torch.log_softmax(lm.logits(batch, [under])[0].double(), -1)
    forced = [float(likely[len(encoded.ids) - 1 + i, t]) for i, t in enumerate(ids)]
    assert [t.logprob for t in said[-1].tokens] == pytest.approx(forced, abs=1e-4)
