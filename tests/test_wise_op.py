"""What the op of WISE decides: which memory a text runs through, by hand, in chunks, on a stack and beside other rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import SENTENCES, lm
from side_memories import SITE, memory_op, patch_of, real_op

from errata.core.bank import Bank, ForwardContext, compile_plan
from errata.core.patch import Op
from errata.core.tail import FullForward, Tail, split_rows
from errata.methods.wise.op import SideMemory, activation


def alone(op: Op, x: torch.Tensor, y: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    return Bank(op.kind, op.site, op.settings, SideMemory.stack_params([op], torch.device("cpu"))).apply(x, y, context)


def scene(rows: int = 6, prompt: int = 4, after: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], ForwardContext]:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, prompt + after, 8, dtype=torch.float64, generator=g) for _ in range(2))
    deltas = [torch.randn(8, 8, dtype=torch.float64, generator=g) * 0.3 for _ in range(3)]
    position = torch.arange(prompt + after).expand(rows, -1).clone()
    lengths = torch.full((rows,), prompt)
    position[1] = torch.tensor([-1, -1, 0, 1, 2, 3])  # padded on the left by two
    lengths[1] = 2
    return x, y, deltas, ForwardContext(position, lengths, size=rows)


@pytest.mark.parametrize("act", ["silu", "linear"])
def test_routing_by_hand(act: str) -> None:
    x, y, deltas, context = scene(rows := 16)
    sigma = activation(act)
    size = torch.zeros(rows, 3, dtype=torch.float64)
    for b in range(rows):
        for i, d in enumerate(deltas):
            tokens = [t for t in range(6) if 0 <= context.position[b, t] < context.prompt_lengths[b]]
            assert len(tokens) == (2 if b == 1 else 4)
            norms = [torch.linalg.vector_norm(sigma(y[b, t] + d @ x[b, t]) - sigma(y[b, t])) for t in tokens]
            size[b, i] = sum(norms) / len(norms)
            if act == "linear":  # the paper's form, without an activation of the output
                torch.testing.assert_close(norms[0], torch.linalg.vector_norm(x[b, tokens[0]] @ d.T))
    least = (size.median(0).values / 0.8).tolist()  # each memory is open to about half of the rows
    least[2] = 1e9  # the last to none
    out = alone(memory_op(deltas, least, act=act), x, y, context)
    seen = set()
    for b in range(rows):
        open_ = [i for i in range(3) if size[b, i] >= 0.8 * least[i]]
        best = max(open_, key=lambda i: float(size[b, i]), default=None)
        seen.add(best)
        if best is None:
            assert torch.equal(out[b], y[b])  # bit for bit
        else:
            real = context.position[b] >= 0  # neither padding nor context
            torch.testing.assert_close(out[b][real], (y[b] + x[b] @ deltas[best].T)[real])
            assert torch.equal(out[b][~real], y[b][~real])
    assert seen == {None, 0, 1}  # all three cases occur


def test_a_long_prompt_is_decided_by_its_largest_token() -> None:
    g = torch.Generator().manual_seed(1)
    x, y, d = torch.randn(1, 101, 8, generator=g).double(), torch.zeros(1, 101, 8).double(), torch.eye(8).double()
    norms = torch.linalg.vector_norm(x, dim=-1)[0]
    least = [float(norms.mean() + norms.max()) / 2]
    op = memory_op([d], least, act="linear", act_ratio=1.0)
    long, short = (ForwardContext(torch.arange(n)[None], torch.tensor([n]), size=1) for n in (101, 100))
    torch.testing.assert_close(alone(op, x, y, long), x)
    assert torch.equal(alone(op, x[:, :100], y[:, :100], short), y[:, :100])


def test_later_chunks_follow_the_prompts_decision() -> None:
    x, y, deltas, context = scene()
    least = [0.0 if i == 0 else 1e9 for i in range(3)]
    for op, want in ((memory_op(deltas, least), y + x @ deltas[0].T), (memory_op(deltas, [1e9] * 3), y)):
        alone(op, x[:, :4], y[:, :4], dataclasses.replace(context, position=context.position[:, :4]))
        later = dataclasses.replace(context, position=context.position[:, 4:], is_prefill=False)
        torch.testing.assert_close(alone(op, x[:, 4:] * 100, y[:, 4:], later) - y[:, 4:], (want - y)[:, 4:] * 100)


def test_patches_of_one_stack_do_not_read_each_others_decisions() -> None:
    base = lm("llama", torch.float64)
    opened, shut = (patch_of(base, real_op(base, least, 0), name) for least, name in (([0.0], "a"), ([1e9], "b")))
    other = patch_of(base, real_op(base, [1e9, 0.0], 3), "c")
    prompts = [p for p, _ in SENTENCES[:4]]
    for stack, same in (((opened, shut), (opened,)), ((shut, opened), (opened,)), ((shut, other), (other,))):
        both = base.generate(prompts, stacks=[stack], rows=[0] * 4, max_new_tokens=4, stop=())
        assert both == base.generate(prompts, stacks=[same], rows=[0] * 4, max_new_tokens=4, stop=())
    assert base.generate(prompts, stacks=[(opened,)], rows=[0] * 4, stop=()) != base.generate(prompts, stop=())


def test_banks_hold_different_numbers_of_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama", torch.float64)
    stacks = [(patch_of(base, real_op(base, least, i), str(i)),) for i, least in enumerate(([0.0], [1e9, 0.0], [1e9] * 3))]
    plan_ = compile_plan([(), *stacks], torch.tensor([0, 1, 2, 3, 2, 1]), base.device)
    [bank] = plan_.banks[SITE]
    assert bank.params["delta"].shape == (3, 3, 32, 64)
    prompts = [SENTENCES[i][0] for i in range(6)]
    rows, batch = [0, 1, 2, 3, 2, 1], base.batch(base.encode(prompts))
    found = []
    for by_entry in (False, True):
        monkeypatch.setattr(Bank, "_by_entry", lambda self, device, value=by_entry: value)
        found.append(base.logits(batch, [(), *stacks], rows))
        said = base.generate(prompts, stacks=[(), *stacks], rows=rows, max_new_tokens=3, stop=())
        for i, row in enumerate(rows):
            [one] = base.generate([prompts[i]], stacks=[((), *stacks)[row]], rows=[0], max_new_tokens=3, stop=())
            assert said[i] == one
    torch.testing.assert_close(*found)
    untouched = base.logits(batch, [()], [0] * 6)
    assert torch.equal(found[1][3], untouched[3])  # every memory shut: the base, bit for bit
    assert not torch.allclose(found[1][[1, 2, 4, 5]], untouched[[1, 2, 4, 5]], atol=1e-3)


def test_a_tail_on_top_of_a_side_memory_runs_whole_passes() -> None:
    base = lm("llama", torch.float64)
    patch = patch_of(base, real_op(base, [0.0], 0), "a")
    rows = split_rows(base.encode([p for p, _ in SENTENCES[:3]], [t for _, t in SENTENCES[:3]]), 2, 0, base.device)
    tail, whole = Tail(base, rows, 2, (patch,)), FullForward(base, rows, 2, (patch,))
    assert tail.whole is not None
    torch.testing.assert_close(tail.logits([]), whole.logits([]))
