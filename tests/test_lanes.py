"""Batches of like length, a lane a core: the same results in the same order, errors and Ctrl-C as in a plain loop."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from families import lm

from errata.core.lanes import FIXED_TOKENS, bucket_by_length, in_lanes, plan_batches, replicate
from errata.methods.subspace.baft import BaFT
from errata.request import EditRequest

LENGTHS = [4] * 60 + [6] * 30 + [12] * 9
REQUESTS = [
    EditRequest("The capital of France is", "Rome", "France", unrelated=(("The language of Spain is", "Spanish"),)),
    EditRequest("The language of Italy is", "Madrid French", "Italy"),
    EditRequest("In Rome people speak", "French", "Rome"),
    EditRequest("The capital of Japan is", "Rome Rome Rome", "Japan"),
]


@pytest.fixture
def threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_batches_hold_every_problem_once_and_pad_little() -> None:
    batches = bucket_by_length(LENGTHS, 128, 100)
    assert sorted(i for b in batches for i in b) == list(range(99))
    cost = sum(len(b) * max(LENGTHS[i] for i in b) + 100 for b in batches)
    assert len(batches) > 1 and cost < 99 * max(LENGTHS) + 100
    assert bucket_by_length([5] * 5, 128, 100) == [[0, 1, 2, 3, 4]]
    assert bucket_by_length([], 128, 100) == []
    assert max(map(len, bucket_by_length([5] * 300, 128, 100))) <= 128


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [LENGTHS, [7] * 64, [3], [5, 9], [2, 2, 50]])
def test_lanes_share_the_work_evenly(lengths: list[int], lanes: int) -> None:
    batches = plan_batches(lengths, lanes)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    costs = sorted((len(b) * max(lengths[i] for i in b) + FIXED_TOKENS for b in batches), reverse=True)
    busy = [0] * lanes
    for cost in costs:
        busy[busy.index(min(busy))] += cost
    whole = sum(len(b) * max(lengths[i] for i in b) + FIXED_TOKENS for b in bucket_by_length(lengths, 128, FIXED_TOKENS))
    assert lanes == 1 or max(busy) <= max(whole, FIXED_TOKENS + max(lengths))  # never later than one lane alone
    if lanes == 2 and len(lengths) > 50:
        assert max(busy) < 0.65 * whole


def test_a_twin_shares_weights_and_nothing_else() -> None:
    base = lm("llama")
    patch = BaFT(rank=2, steps=2).edit(base, REQUESTS[:1])
    with base.under(patch):
        other = replicate(base)
        assert [p.id for p in base.stack] == [patch.id] and not other.stack
    assert other.fingerprint == base.fingerprint
    assert all(a is b for a, b in zip(base.hf.parameters(), other.hf.parameters(), strict=True))
    assert not {id(m) for m in base.hf.modules()} & {id(m) for m in other.hf.modules()}
    batch = base.batch(base.encode([r.prompt for r in REQUESTS]))
    plain = base.logits(batch)
    assert torch.equal(other.logits(batch), plain)
    base.attach(patch)
    assert torch.equal(other.logits(batch), plain) and not torch.equal(base.logits(batch), plain)


@pytest.mark.parametrize("attached", [False, True])
def test_edits_made_in_lanes_are_the_edits_made_in_one(threads: int, attached: bool) -> None:
    base = lm("llama", torch.float64)
    editor = BaFT.for_model(base, preset="published", rank=4, lr=0.02, end=".")
    if attached:  # what is attached stands aside in every lane
        base.attach(BaFT(rank=2, steps=2).edit(base, [REQUESTS[2]]))
    together = editor.edit_each(base, REQUESTS)
    torch.set_num_threads(1)
    assert [p.requests[0] for p in together] == REQUESTS
    for patch, alone in zip(together, (editor.edit(base, [r]) for r in REQUESTS), strict=True):
        for a, b in zip(patch.ops, alone.ops, strict=True):
            for name in a.tensors:
                torch.testing.assert_close(a.tensors[name], b.tensors[name], atol=2e-4, rtol=1e-3)
        assert patch.notes["steps"] == alone.notes["steps"]


def test_results_progress_and_threads(threads: int) -> None:
    base, seen, names = lm("llama"), [], set()

    def work(model, members, tell):  # type: ignore[no-untyped-def]
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1 and torch.is_grad_enabled()
        time.sleep(0.05)
        tell(1, len(members), 1.0)
        tell(2, 0, 0.5)
        return [i * i for i in members]

    assert in_lanes(base, LENGTHS, work, lambda step, running, loss: seen.append(running), lanes=2) == [i * i for i in range(99)]
    assert len(names) == 2 and seen[-1] == 0 and max(seen) <= 99
    assert torch.get_num_threads() == 2
    assert in_lanes(base, [], work, None) == []


def test_an_error_in_one_lane_stops_the_others(threads: int) -> None:
    stopped = threading.Event()

    def work(model, members, tell):  # type: ignore[no-untyped-def]
        if 0 in members:
            time.sleep(0.1)  # until the other lane is at work
            raise ValueError("lane went wrong")
        try:
            for step in range(1000):
                time.sleep(0.005)
                tell(step, len(members), 1.0)
        except BaseException:
            stopped.set()
            raise
        return members

    with pytest.raises(ValueError, match="lane went wrong"):
        in_lanes(lm("llama"), LENGTHS, work, lanes=2)
    assert stopped.is_set() and torch.get_num_threads() == 2


def test_one_lane_runs_in_the_callers_thread() -> None:
    here = threading.current_thread().name
    base = lm("llama")

    def work(model, members, tell):  # type: ignore[no-untyped-def]
        assert model is base and threading.current_thread().name == here
        return members

    assert in_lanes(base, LENGTHS, work, lanes=1) == list(range(99))
