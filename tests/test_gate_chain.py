"""Many gated edits at one site as one: the outputs and gradients of the edits one after another, and nothing where no gate opens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import lm

from errata.core.bank import compile_plan
from errata.core.patch import Op, Patch, Site
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.chain import GateChain
from errata.methods.subspace.op import Subspace, orthonormal, start
from errata.request import EditRequest

WIDTH, RANK = 32, 3
SETTINGS = {"gate": "rmsnorm", "last": None, "threshold": 0.55}


def _op(seed: int, gate: str = "rmsnorm", **settings: Any) -> Op:
    """Random, with gates that open on about a third of random states."""
    p = {k: t.double() for k, t in start(RANK, WIDTH, gate, "pyreft", seed, torch.device("cpu")).items()}
    tensors = {("R" if k == "X" else k): (orthonormal(t) if k == "X" else t) for k, t in p.items()}
    tensors["b"] = tensors["b"] + 0.5  # opens far enough to open and shut the gates behind it
    if gate == "rmsnorm":
        tensors["g"] = tensors["g"] + 0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Op("subspace", Site(1), tensors, {**SETTINGS, "gate": gate, **settings})


class _Context:
    def __init__(self, acts: torch.Tensor) -> None:
        self.acts, self.patch_index = acts, 0

    def active(self, last: int | None) -> torch.Tensor:
        return self.acts.unsqueeze(-1)

    def record(self, *_: Any) -> None:
        pass

    def select(self, rows: torch.Tensor) -> _Context:
        return _Context(self.acts[rows])


def _one_by_one(ops: list[Op], y: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
    for op in ops:
        y = Subspace.apply({k: t[None] for k, t in op.tensors.items()}, op.settings, y, y, op.site, _Context(acts))
    return y


@pytest.mark.parametrize("gate", ["rmsnorm", "shared_logit", "subspace"])
def test_a_chain_is_its_edits_one_after_another(gate: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ops = [_op(seed, gate) for seed in range(7)]
    columns = [ops, ops[:2], [], [ops[4], ops[1], ops[6]], ops[3:4]]
    rows = torch.tensor([0, 3, 2, 1, -1, 0, 4])
    y = torch.randn(len(rows), 9, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    acts = torch.rand(len(rows), 9, generator=generator) < 0.8
    out = GateChain.of(columns, rows, y.device).apply(y, y, _Context(acts))
    wanted = torch.cat([_one_by_one(columns[int(r)] if r >= 0 else [], y[i : i + 1], acts[i : i + 1]) for i, r in enumerate(rows)])
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
    still = (wanted == y).all(-1)
    assert torch.equal(out[still], y[still]) and 10 < int(still.sum()) < still.numel() - 10
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (got,), (right,) = (torch.autograd.grad((o * weights).sum(), y) for o in (out, wanted))
    torch.testing.assert_close(got, right, atol=1e-11, rtol=0)


def test_one_edit_opens_or_shuts_the_gates_of_later_ones() -> None:
    """Or the test above would hold for a chain that asks all gates at the first state."""
    ops = [_op(seed) for seed in range(7)]
    y = torch.randn(40, 1, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = GateChain.of([ops], None, y.device)
    alone = chain._open(y[:, 0])
    state, differs = y, 0
    for u, op in enumerate(ops):
        differs += int((chain._open(state[:, 0])[:, u] != alone[:, u]).sum())
        state = _one_by_one([op], state, torch.ones(40, 1, dtype=torch.bool))
    assert differs > 5


def test_where_nothing_opens_the_very_tensor_comes_back() -> None:
    ops = [_op(seed, threshold=0.999) for seed in range(4)]
    y = torch.randn(3, 5, WIDTH, dtype=torch.bfloat16)
    assert GateChain.of([ops], None, y.device).apply(y, y, _Context(torch.ones(3, 5, dtype=torch.bool))) is y


def _patch(base: Any, seed: int, **settings: Any) -> Patch:
    """Two ops; in float32, as made."""
    ops = []
    for block in (1, 2):
        op = _op(seed * 10 + block, **settings)
        tensors = {k: t.float() for k, t in op.tensors.items()}
        ops.append(Op("subspace", Site(block), tensors, op.settings))
    return Patch("baft", {}, base.fingerprint, (EditRequest(f"a {seed}", "b"),), tuple(ops))


def _kinds(plan: Any) -> set[str]:
    return {type(bank).__name__ for banks in plan.banks.values() for bank in banks}


def test_logits_and_generated_text_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama")
    patches = [_patch(base, seed) for seed in range(5)]
    stacks = [tuple(patches), tuple(patches[:3]), (), (patches[4], patches[0])]
    prompts = ["The capital of France is", "The language of Italy is", "In Rome people speak", "The capital of Spain is"]

    def answers() -> tuple[torch.Tensor, list[str], list[str]]:
        batch = base.batch(base.encode(prompts))
        with torch.no_grad(), base.running(base.plan(stacks, torch.arange(4), 4)):
            logits = base.forward(batch.ids, batch.mask, use_cache=False).logits
        with base.under(*patches):
            one = base.generate(prompts, max_new_tokens=6)
        return logits, base.generate(prompts, max_new_tokens=6, stacks=stacks, rows=torch.arange(4)), one

    assert _kinds(base.plan(stacks, torch.arange(4), 4)) == {"GateChain"}
    logits, several, one = answers()
    monkeypatch.setattr(Subspace, "chain_key", staticmethod(lambda op: None))
    assert _kinds(base.plan(stacks, torch.arange(4), 4)) == {"Bank"}
    plain, plainly, plain_one = answers()
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    assert several == plainly and one == plain_one and len(set(several)) > 1
    assert not torch.equal(logits[0], logits[2])


def test_what_it_cannot_do_runs_as_before() -> None:
    base = lm("llama")
    device = torch.device("cpu")
    one, other = _patch(base, 1), _patch(base, 2)
    assert _kinds(compile_plan([(one,)], None, device)) == {"Bank"}  # alone
    assert _kinds(compile_plan([(one,), (other,)], torch.arange(2), device)) == {"Bank"}  # each stack one
    assert _kinds(compile_plan([(one, other)], None, device)) == {"GateChain"}
    assert _kinds(compile_plan([(one, _patch(base, 3, threshold=0.0))], None, device)) == {"Bank"}  # never quite shut
    assert _kinds(compile_plan([(one, _patch(base, 3, last=3))], None, device)) == {"Bank"}  # other tokens


def test_an_edit_trained_on_a_chain_is_the_one_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama")
    editor = BaFT(layers=(1, 2), rank=3, steps=6, prefixes=0, contrast=0, other_facts=0)
    below = tuple(_patch(base, seed) for seed in range(3))
    request = EditRequest("The capital of France is", "Rome", "France")
    (chained,) = editor.edit_each(base, [request], on=below)
    monkeypatch.setattr(Subspace, "chain_key", staticmethod(lambda op: None))
    (plain,) = editor.edit_each(base, [request], on=below)
    for a, b in zip(chained.ops, plain.ops, strict=True):
        for name in a.tensors:
            torch.testing.assert_close(a.tensors[name], b.tensors[name], atol=1e-4, rtol=1e-3)


def test_rows_come_and_go() -> None:
    """The server selects rows of a compiled plan, one also several times."""
    base = lm("llama")
    patches = [_patch(base, seed) for seed in range(3)]
    stacks = [tuple(patches), (patches[0],), tuple(patches[1:])]
    y = torch.randn(3, 4, WIDTH)
    acts = torch.ones(3, 4, dtype=torch.bool)
    (chain,) = base.plan(stacks, torch.arange(3), 3).banks[Site(1)]
    every = chain.apply(y, y, _Context(acts))
    order = torch.tensor([2, 0, 0])
    torch.testing.assert_close(chain.select(order).apply(y[order], y[order], _Context(acts)), every[order])
