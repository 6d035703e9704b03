"""Rows that take turns: each is run at its step, beside those that always are, under its own problem."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import lm

from errata import registry
from errata.core.keep import find_kept
from errata.core.problems import RowsInTurns
from errata.core.tail import FullForward, Tail, join_rows, split_rows_at
from errata.core.tokens import pad_id
from errata.methods.adapters.lora import LoRA
from errata.methods.subspace.baft import BaFT
from errata.methods.texts import neighbours, ways_to_ask, what_stays
from errata.request import EditRequest

STAYS = (("The capital of Italy is", "Rome"), ("The capital of Spain is", "Madrid"), ("The capital of Japan is", "Tokyo"))
FRANCE = EditRequest("The capital of France is", "Rome", "France", contrast=STAYS)


def test_every_row_has_its_turn() -> None:
    rows = RowsInTurns(torch.tensor([0, 0, 1]), 2, torch.tensor([-1, 0, 1]))
    found = [rows.of(torch.tensor([0, 1]), step) for step in range(3)]
    assert [numbers.tolist() for _, numbers in found] == [[0, 1], [0, 2], [0, 1]]
    assert [owner.tolist() for owner, _ in found] == [[0, 0], [0, 1], [0, 0]]
    assert [part.tolist() for part in rows.of(torch.tensor([1]), 1)] == [[0], [2]]
    always = RowsInTurns(torch.tensor([0, 0, 1]), 2, torch.tensor([-1, -1, -1]))
    assert [part.tolist() for part in always.of(torch.tensor([0, 1]), 7)] == [[0, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("runner", [Tail, FullForward])
@pytest.mark.parametrize("starts", [((1, 2, 0), (3, 0)), ((0, 0, 1), (2, 4)), ((3, 3, 3), (1, 1))])
def test_rows_joined_in_one_batch_say_what_they_say_apart(runner: Any, starts: tuple[tuple[int, ...], ...]) -> None:
    base = lm("llama", torch.float64)
    texts = base.encode(["The capital of France is", "In Rome people speak", "The capital of Spain is"], ["Rome", "French", "Paris"])
    more = base.encode(["The language that most people of Spain speak is", "The head of France is"], [".", "."])
    apart = [split_rows_at(own, at, pad_id(base.tokenizer), base.device) for own, at in zip((texts, more), starts, strict=True)]
    joined = runner(base, join_rows(*apart, pad_id(base.tokenizer)), 2)
    want = [runner(base, rows, 2).logits([]) for rows in apart]
    torch.testing.assert_close(joined.logits([]), torch.cat(want), atol=1e-10, rtol=1e-8)
    some = torch.tensor([1, 4])
    of = joined.rows.label_mask.nonzero()[:, 0]
    torch.testing.assert_close(joined.select(some).logits([]), torch.cat(want)[torch.isin(of, some)], atol=1e-10, rtol=1e-8)


def test_prompt_and_neighbours_stand_behind_the_same_texts() -> None:
    base = lm("llama")
    asked = ways_to_ask(base, FRANCE, 2)
    assert asked[0] == FRANCE.prompt and len(asked) == 3 and all(text.endswith(f" {FRANCE.prompt}") for text in asked[1:])
    before = [text.removesuffix(FRANCE.prompt) for text in asked[1:]]
    stays = what_stays(base, [FRANCE], 2)
    assert stays[:3] == list(STAYS) and [p.removesuffix(q) for (p, _), (q, _) in zip(stays[3:], STAYS, strict=True)] == [*before, before[0]]
    assert what_stays(base, [FRANCE], 0) == list(STAYS) and ways_to_ask(base, FRANCE, 0) == [FRANCE.prompt]


def test_no_edit_ends_before_every_way_to_ask_was_seen_to_hold() -> None:
    base = lm("llama")
    loose = BaFT(layers=(1, 2), rank=4, lr=0.02, weight_decay=0.0, prefixes=3, stop=1e9).edit(base, [FRANCE])
    assert loose.notes["steps"] == 2  # a stop that all meet: three evaluations, two updates between them
    plain = BaFT(layers=(1, 2), rank=4, lr=0.02, weight_decay=0.0, prefixes=0, stop=1e9).edit(base, [FRANCE])
    assert plain.notes["steps"] == 0
    few = BaFT(layers=(1, 2), rank=4, prefixes=4, steps=1).edit(base, [FRANCE])
    assert few.notes["steps"] == 1 and few.notes["loss"] < 1e6


def test_adapters_see_every_way_to_ask_before_they_end_and_one_short_text_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama", torch.float64)
    seen: list[list[int]] = []
    of = RowsInTurns.of

    def watched(self: RowsInTurns, alive: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        owner, numbers = of(self, alive, step)
        seen.append(numbers.tolist())
        return owner, numbers

    monkeypatch.setattr(RowsInTurns, "of", watched)
    loose = LoRA(rank=2, prefixes=3, stop=1e9).edit(base, [FRANCE])
    assert loose.notes["steps"] == 2 and seen == [[0, 1], [0, 2], [0, 3]]


def test_an_adapter_behind_short_texts_equals_one_trained_on_those_texts() -> None:
    """Each step's loss is that of the prompt and of the text whose turn it is, and the neighbours stand behind the texts, too."""
    base = lm("llama", torch.float64)
    one = LoRA(rank=2, prefixes=1, dropout=0.0, steps=4, stop=0.0, lr=0.01, contrast_batch=0)
    before = ways_to_ask(base, FRANCE, 1)[1]
    pairs = tuple(neighbours(base, STAYS, 1))
    assert len(pairs) == 2 * len(STAYS) and pairs[: len(STAYS)] == STAYS and pairs[-1][0].endswith(STAYS[-1][0])
    by_hand = dataclasses.replace(FRANCE, paraphrases=(before,), contrast=pairs)
    for a, b in zip(one.edit(base, [FRANCE]).ops, dataclasses.replace(one, prefixes=0).edit(base, [by_hand]).ops, strict=True):
        assert a.site == b.site and float(a.tensors["up"].abs().max()) > 0
        for name in a.tensors:
            torch.testing.assert_close(a.tensors[name], b.tensors[name], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("method", ["ft-m", "loc-ft"])
def test_fine_tuning_behind_short_texts_equals_training_on_those_texts(method: str) -> None:
    base = lm("llama", torch.float64)
    settings: dict[str, Any] = {"layers": (1,), "steps": 3, "stop": 0.0, "contrast": 3, "contrast_batch": 0, "batch_size": 3}
    settings |= {"eos": False} if method == "loc-ft" else {}
    before = ways_to_ask(base, FRANCE, 2)[1:]
    by_hand = dataclasses.replace(FRANCE, paraphrases=tuple(before), contrast=tuple(neighbours(base, STAYS, 2)))
    kind = registry.get("method", method)
    (a,), (b,) = (kind(**settings, prefixes=n).edit(base, [r]).ops for n, r in ((2, FRANCE), (0, by_hand)))
    torch.testing.assert_close(a.tensors["weight"], b.tensors["weight"], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("method", ["reft", "lora", "ft-m"])
def test_the_output_term_holds_neighbours_behind_the_texts_that_the_prompt_stands_behind(method: str) -> None:
    base = lm("llama")
    editor = registry.get("method", method)(layers=(1,), rank=2, prefixes=2, contrast=3)
    kept = find_kept(editor, base, [[FRANCE]], Tail, 2, ())
    assert kept is not None and len(kept.owner) == 2 * len(STAYS) and editor.pairs_kept(base, [[FRANCE]]) == [neighbours(base, STAYS, 2)]
    assert find_kept(dataclasses.replace(editor, contrast=0), base, [[FRANCE]], Tail, 2, ()) is None
    assert editor.rows_kept(FRANCE) == min(2 * len(STAYS), 2 * editor.contrast_batch)
    kept.in_turns(editor.contrast_batch)
    assert all(int(kept.now(step).sum()) <= editor.rows_kept(FRANCE) for step in range(kept.turns))
