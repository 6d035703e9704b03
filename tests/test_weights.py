"""Weight-like ops add up: a stack is one op a site, and every row still gets what it gets alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import lm
from made import DTYPES, PROMPTS, logits, made
from torch import Tensor

from errata.core.bank import Bank, ForwardContext
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.weights import compact, delta_weight, merge
from errata.errors import PatchError
from errata.export import bake, export_lora


def looped(base: LM, stack: tuple[Patch, ...]) -> Tensor:
    """Logits under a stack by the plainest means: a hook a patch."""

    def beside(op: Op) -> Callable[..., Tensor]:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            t = op.tensors
            if op.kind == "dense":
                return output + args[0] @ t["weight"].T
            return output + (args[0] @ t["down"].T) @ t["up"].T

        return hook

    ops = [op for patch in stack for op in patch.ops]
    hooks = [base.module(o.site).register_forward_hook(beside(o)) for o in ops]
    try:
        return logits(base)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_stack_is_its_patches_one_by_one(count: int, family: str, dtype: str) -> None:
    base = lm(family, DTYPES[dtype])
    stack = tuple(
        made(base, seed, 1 + seed % 3, ("mlp_down", "attn_out")[seed % 2], seed % 4 // 2, DTYPES[dtype]).scale(count**-0.5)
        for seed in range(count)
    )
    near = {"atol": 1e-9, "rtol": 1e-9} if dtype == "float64" else {"atol": 2e-4, "rtol": 1e-3}
    want = looped(base, stack)
    torch.testing.assert_close(logits(base, *stack), want, **near)
    torch.testing.assert_close(logits(base, merge(stack)), want, **near)
    assert not torch.allclose(want, logits(base), atol=1e-3)
    plan = base.plan([stack], None, 1)
    assert all(len(banks) == 1 for banks in plan.banks.values())
    if count == 1:  # used as it is
        (bank,) = (b for banks in plan.banks.values() for b in banks)
        assert bank.params["down"].data_ptr() == stack[0].ops[0].tensors["down"].data_ptr()
    if count == 50 and family == "llama":  # about 25 ranks a site, and R (I + O) > I O from 22
        assert {b.kind for banks in plan.banks.values() for b in banks} == {"dense"}


def test_rows_under_mixed_stacks_get_what_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, one, many and dense side by side, by copies and by entry, in few banks."""
    base = lm("llama", torch.float64)
    p = [made(base, seed, rank, dtype=torch.float64) for seed, rank in enumerate((1, 2, 4, 3, 0, 1, 0, 9))]
    many = tuple(made(base, 100 + i, 1, dtype=torch.float64).scale(0.3) for i in range(40))
    other = made(base, 9, 2, "attn_out", 2, torch.float64)
    stacks = [(), (p[0],), (p[1], p[2]), many, (p[4],), (p[3], p[4], p[6]), (p[5], other), (p[7],), tuple(p)]
    which = torch.tensor([8, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 3, 3, 6, 2, 5])
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(len(which))]
    batch = base.batch(base.encode(texts))
    alone = torch.cat([base.logits(base.batch(base.encode(texts)), [stacks[s]])[i : i + 1] for i, s in enumerate(which.tolist())])
    plain = base.logits(batch)
    for few in (2_000_000, 0):
        monkeypatch.setattr("errata.core.bank.FEW", few)
        monkeypatch.setattr("errata.core.bank.LAUNCH", {"cpu": 0})
        mixed = base.logits(batch, stacks, which)
        torch.testing.assert_close(mixed, alone, atol=1e-9, rtol=1e-9)
        assert torch.equal(mixed[which == 0], plain[which == 0])
    plan = base.plan(stacks, which, len(which))
    assert sum(map(len, plan.banks.values())) <= 5  # a site: dense, rank to 4, to 8, to 16; the other site


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_by_entry_is_by_copies(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, with rows that have no entry and entries that have no row."""
    g = torch.Generator().manual_seed(0)
    shapes = {"down": (5, 2, 6), "up": (5, 4, 2)} if kind == "low_rank" else {"weight": (5, 4, 6)}
    params = {k: torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}
    x, y = torch.randn(9, 3, 6, generator=g, dtype=torch.float64), torch.randn(9, 3, 4, generator=g, dtype=torch.float64)
    context = ForwardContext(torch.arange(3).expand(9, 3), torch.full((9,), 3))
    for rows in ([3, -1, 0, 3, 3, 1, -1, 4, 0], [2] * 9, [-1] * 9, [4, 3, 2, 1, 0, 4, 3, 2, 1]):
        found = []
        for few in (10**9, -(10**9)):
            monkeypatch.setattr("errata.core.bank.FEW", few)
            out = Bank(kind, Site(0, "mlp_down"), {}, params, torch.tensor(rows)).apply(x, y, context)
            loss = out.square().sum()
            grads = torch.autograd.grad(loss, list(params.values())) if loss.requires_grad else ()
            found.append((out.detach(), *grads))
        assert len(found[0]) == len(found[1])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
        without = torch.tensor(rows) < 0
        assert torch.equal(found[1][0][without], y[without])


def test_equal_stacks_share_their_sum() -> None:
    base = lm("llama")
    stack = tuple(made(base, seed, 1) for seed in range(5))
    (banks,) = base.plan([tuple(stack) for _ in range(6)], range(6), 6).banks.values()
    assert [b.params["down"].shape for b in banks] == [(1, 5, 64)]


def test_an_op_that_reads_y_stays_in_its_place() -> None:
    """A subspace op at a linear's output between two weight-like ones sees the first and not the second."""
    base = lm("llama")
    a, b = made(base, 0), made(base, 1)
    site = a.ops[0].site
    g = torch.Generator().manual_seed(0)
    r = torch.linalg.qr(torch.randn(32, 3, generator=g)).Q.mT.contiguous()
    tensors = {"R": r, "A": torch.randn(3, 32, generator=g), "b": torch.randn(3, generator=g)}
    reads = Patch("test", {}, base.fingerprint, (), (Op("subspace", site, tensors, {"gate": "none", "last": 99}),))
    banks = base.plan([(a, a.scale(0.5), reads, b, b.scale(0.5))], None, 1).banks[site]
    assert [bank.kind for bank in banks] == ["low_rank", "subspace", "low_rank"]
    want = logits(base, a, a.scale(0.5), reads, b, b.scale(0.5))
    torch.testing.assert_close(logits(base, a.scale(1.5), reads, b.scale(1.5)), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base, reads, a.scale(1.5), b.scale(1.5)), want, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3, 12, 20, 33, 70])
def test_compact(rank: int) -> None:
    """I = 64, O = 32: factors of rank 22 and more hold more numbers than the matrix."""
    op = made(lm("llama"), 0, rank).ops[0]
    small = compact(op)
    assert small.kind == ("low_rank" if rank < 22 else "dense") and small.tensors.keys() <= {"down", "up", "weight"}
    torch.testing.assert_close(delta_weight(small), delta_weight(op), atol=1e-6, rtol=1e-5)
    assert {t.dtype for t in small.tensors.values()} == {torch.float32}
    twice = Op("low_rank", op.site, {"down": op.tensors["down"].repeat(3, 1), "up": op.tensors["up"].repeat(1, 3)})
    again = compact(twice)
    assert again.kind == small.kind and (rank > 21 or again.tensors["down"].shape == (rank, 64))
    torch.testing.assert_close(delta_weight(again), 3 * delta_weight(op), atol=1e-5, rtol=1e-5)


def test_a_merged_patch_stands_for_all_it_was_made_of() -> None:
    base = lm("llama")
    a, b = made(base, 0), made(base, 1)
    later = dataclasses.replace(made(base, 2), replaces=(a.id,))
    one = merge((a, later, b))
    assert set(one.replaces) == {a.id, later.id, b.id}
    want = logits(base, a, later, b)
    for stack in ((one,), (a, one), (b, later, one)):
        torch.testing.assert_close(logits(base, *stack), want, atol=1e-4, rtol=1e-4)


def test_patches_that_disagree_on_a_linear() -> None:
    base = lm("llama")
    bad = Patch("t", {}, base.fingerprint, (), (Op("low_rank", Site(1, "mlp_down"), {"down": torch.ones(1, 8), "up": torch.ones(32, 1)}),))
    with pytest.raises(PatchError, match=r"differ in the size of the linear"):
        merge((made(base, 0), bad))
    for use in (lambda: base.plan([(made(base, 0), bad)], None, 1), lambda: base.attach(bad), lambda: bake(base, (bad,), "nowhere")):
        with pytest.raises(PatchError, match=r"made for an input of 8 numbers, here there are 64"):
            use()
    odd = Patch("t", {}, base.fingerprint, (), (Op("low_rank", Site(1, "mlp_down"), {"down": torch.ones(2, 64), "up": torch.ones(32, 1)}),))
    with pytest.raises(PatchError, match=r"tensor 'up' has shape \[32, 1\], not \[O, R\] with \{'R': 2"):
        export_lora(base, (odd,), "nowhere")
