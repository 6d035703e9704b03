"""The output term (`errata.core.keep`): against full forward passes and torch's own divergence, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from families import lm
from torch import Tensor
from torch.nn.functional import kl_div

from errata.core.bank import Bank
from errata.core.families import linear_sizes
from errata.core.fit import SGD, fit
from errata.core.keep import Kept, token_kl
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import truncate
from errata.core.tail import FullForward, Tail
from errata.request import EditRequest

PAIRS = (("The capital of Spain is", "Madrid"), ("The capital of Japan is", "Tokyo"), ("The language of France is", "French"))
REQUESTS = [
    EditRequest("The capital of France is", "Rome", "France", contrast=PAIRS[:2]),
    EditRequest("The language of Italy is", "Spanish", "Italy"),  # brings none
    EditRequest("In Rome people speak", "French", "Rome", contrast=PAIRS),
]
PROBLEMS = [[r] for r in REQUESTS]
SITE = Site(1, "mlp_down")
EXACT = {"atol": 1e-10, "rtol": 0.0}
families = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gemma2 has soft caps behind its head
RUNNERS = pytest.mark.parametrize("runner", [Tail, FullForward])


def base(family: str) -> LM:
    return lm(family, torch.float64)


def changes(model: LM, count: int, size: float = 0.1) -> Tensor:
    inner, outer = linear_sizes(model.module(SITE))
    return size * torch.randn((count, outer, inner), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def banks(weight: Tensor, owner: Tensor) -> list[Bank]:
    return [Bank("dense", SITE, {}, {"weight": weight}, owner)]


def everything(kept: Kept) -> Tensor:
    return torch.arange(kept.count)


def divergence(kept: Kept, weight: Tensor, alive: Tensor | None = None) -> Tensor:
    rows = kept.of(everything(kept) if alive is None else alive)
    return rows.divergence(banks(weight, rows.owner))


def by_hand(model: LM, pairs: Sequence[tuple[str, str]], change: Tensor, answers: bool) -> Tensor:
    """Two full forward passes a pair."""
    patch = Patch("test", {}, model.fingerprint, (), (Op("dense", SITE, {"weight": change}),))
    out = []
    for row in model.encode([p for p, _ in pairs], [a for _, a in pairs]):
        last = row.prompt_length - 1
        batch = model.batch([row if answers else truncate(row, last)])  # Gemma's norms are float32: as long a text
        places = slice(last, len(row.ids) - 1 if answers else last + 1)
        p, q = (model.logits(batch, [stack])[0, places].log_softmax(-1) for stack in ((), (patch,)))
        out.append(kl_div(q, p, log_target=True, reduction="sum") / len(p))
    return torch.stack(out).mean()


@families
@RUNNERS
def test_nothing_changed_costs_nothing(family: str, runner: type) -> None:
    model = base(family)
    weight = torch.zeros_like(changes(model, 3)).requires_grad_()
    kl = divergence(Kept(model, PROBLEMS, runner, SITE.block), weight)
    (gradient,) = torch.autograd.grad(kl.sum(), weight)
    assert float(kl.detach().abs().max()) < 1e-14 and float(gradient.abs().max()) < 1e-14


@families
@RUNNERS
@pytest.mark.parametrize("answers", [True, False])
def test_equals_two_full_forward_passes(family: str, runner: type, answers: bool) -> None:
    model = base(family)
    weight = changes(model, 3)
    kl = divergence(Kept(model, PROBLEMS, runner, SITE.block, answers=answers), weight)
    assert float(kl[1]) == 0.0 and float(kl[0]) > 1e-6
    for i in (0, 2):
        torch.testing.assert_close(kl[i], by_hand(model, REQUESTS[i].contrast, weight[i], answers), **EXACT)


def test_the_gradient_is_that_of_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    logits, other = (torch.randn((4, 7), generator=g, dtype=torch.float64) for _ in range(2))
    log_p = other.log_softmax(1)
    out = []
    for kl in (token_kl, lambda x, p: kl_div(x.log_softmax(1), p, log_target=True, reduction="none").sum(1)):
        leaf = logits.clone().requires_grad_()
        value = kl(leaf, log_p)
        out.append((value.detach(), *torch.autograd.grad((value * torch.arange(1, 5)).sum(), leaf)))
    for own, plain in zip(*out, strict=True):
        torch.testing.assert_close(own, plain, **EXACT)


def test_the_tail_gives_the_gradient_of_everything_every_time() -> None:
    model, out = base("llama"), []
    for runner in (Tail, FullForward):
        weight = changes(model, 3).requires_grad_()
        out += torch.autograd.grad(divergence(Kept(model, PROBLEMS, runner, SITE.block), weight).square().sum(), weight)
    assert float(out[0].abs().max()) > 1e-4
    torch.testing.assert_close(*out, **EXACT)


def test_many_problems_train_as_each_alone() -> None:
    """Each pulled away from the base by a term of its own; they meet the stop at different steps."""
    model = base("llama")
    away = changes(model, 3, 0.3)

    def run(problems: list[list[EditRequest]], away: Tensor) -> tuple[Tensor, Tensor]:
        kept = Kept(model, problems, Tail, SITE.block, answers=True)

        def loss(p: dict[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
            rows = kept.of(alive)
            total = rows.divergence(banks(p["weight"], rows.owner)) + 0.5 * (p["weight"] - away[alive]).square().sum((1, 2))
            return total, total

        fitted = fit({"weight": torch.zeros_like(away)}, loss, steps=60, optimizer=SGD(0.1), stop=2.0)
        return fitted.params["weight"], fitted.steps

    weights, steps = run(PROBLEMS, away)
    assert len(set(steps.tolist())) > 1
    for i, own in enumerate(PROBLEMS):
        if own[0].contrast:
            alone, made = run([own], away[i : i + 1])
            torch.testing.assert_close(weights[i], alone[0], **EXACT)
            assert int(made[0]) == int(steps[i])


def test_problems_that_ended_leave_and_mini_batches_are_cut() -> None:
    model = base("llama")
    kept, weight = Kept(model, PROBLEMS, Tail, SITE.block), changes(model, 3)
    whole = divergence(kept, weight)
    torch.testing.assert_close(divergence(kept, weight[[0, 2]], torch.tensor([0, 2])), whole[[0, 2]], **EXACT)
    assert kept.owner.tolist() == [0, 0, 2, 2, 2] and kept.request.tolist() == [0, 0, 2, 2, 2]
    kept = Kept(model, PROBLEMS, Tail, SITE.block, answers=True)
    few = kept.select(torch.tensor([1, 3]), torch.tensor([0, 1]), 2)
    want = torch.stack([by_hand(model, [REQUESTS[i].contrast[1]], weight[i], True) for i in (0, 2)])
    torch.testing.assert_close(few.divergence(banks(weight[[0, 2]], few.owner)), want, **EXACT)
    assert few.even and not kept.of(everything(kept)).even


def test_what_is_too_much_to_keep_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weight = base("llama"), changes(base("llama"), 3)
    want = divergence(Kept(model, PROBLEMS, Tail, SITE.block), weight)
    monkeypatch.setattr("errata.core.keep._NUMBERS_KEPT", 0)
    kept = Kept(model, PROBLEMS, Tail, SITE.block)
    assert not kept.few
    torch.testing.assert_close(divergence(kept, weight), want, **EXACT)
    torch.testing.assert_close(divergence(kept, weight[2:], torch.tensor([2])), want[2:], **EXACT)


def test_only_picked_positions_reach_the_head() -> None:
    model, seen = base("llama"), []
    head = model.hf.get_output_embeddings().register_forward_hook(lambda _, x, y: seen.append(y.numel() // y.shape[-1]))
    try:
        for answers in (True, False):
            kept = Kept(model, PROBLEMS, Tail, SITE.block, answers=answers)
            divergence(kept, changes(model, 3))
            divergence(kept, changes(model, 1), torch.tensor([2]))
    finally:
        head.remove()
    one, three = (sum(len(row.target) for row in model.encode(*zip(*r.contrast, strict=True))) for r in (REQUESTS[0], REQUESTS[2]))
    assert seen == [one + three, one + three, three, 5, 5, 3]


def test_an_edit_that_goes_on_keeps_what_was_so_far() -> None:
    """p is read under ``start``, and under what runs underneath."""
    model, weight = base("llama"), changes(base("llama"), 3)
    kept = Kept(model, PROBLEMS, Tail, SITE.block, start=lambda owner: banks(weight, owner))
    assert float(divergence(kept, weight).abs().max()) < 1e-14 < 1e-3 < float(divergence(kept, 0 * weight).max())
    patch = Patch("test", {}, model.fingerprint, (), (Op("dense", SITE, {"weight": weight[0]}),))
    same = [[dataclasses.replace(r, contrast=PAIRS)] for r in REQUESTS]
    under, without = (Kept(model, same, Tail, SITE.block, on) for on in ((patch,), ()))
    assert float(divergence(under, 0 * weight).abs().max()) < 1e-14
    torch.testing.assert_close(divergence(under, weight) != divergence(without, weight), torch.ones(3, dtype=torch.bool))
