"""What training weights beside a linear asks of the core: mini-batches, gradients of any layout, one stack a bank on the way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errata.core.fit import AdamW, fit_epochs
from errata.core.patch import Site
from errata.core.weights import Dense, LowRank, RowGroups


def test_a_gradient_of_any_layout_makes_the_same_update() -> None:
    """A matrix product's gradient comes transposed; torch's fused kernel reads memory in order and does not look."""
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn((3, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    out = []
    for gradient in (g, g.T.contiguous().T):
        now, first, second = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
        AdamW(0.1).update([now], [gradient], [first], [second], step=1)
        out.append(now)
    assert not g.T.contiguous().T.is_contiguous() and torch.equal(*out)


def test_steps_that_are_left_out_leave_the_moments_alone() -> None:
    """Two problems whose losses cross the stop at different times: each as torch's Adam that skips them, count of updates and all."""
    stop, targets = 0.02, torch.tensor([[1.0, -1.0], [3.0, 0.5]], dtype=torch.float64)  # [problem, batch]

    def loss(p: dict[str, Tensor], alive: Tensor, *, number: int, batch: int) -> tuple[Tensor, Tensor]:
        return (p["x"][:, batch] - targets[alive, batch]).square() + p["x"].square().sum(1) * 1e-3, torch.ones(len(alive))

    fitted = fit_epochs({"x": torch.zeros(2, 2, dtype=torch.float64)}, loss, epochs=40, batches=2, optimizer=AdamW(0.1), stop=stop)
    for i in range(2):
        x, made = torch.zeros(2, dtype=torch.float64, requires_grad=True), 0
        optimiser = torch.optim.Adam([x], 0.1)
        for _ in range(40):
            values = []
            for batch in range(2):
                value = (x[batch] - targets[i, batch]).square() + x.square().sum() * 1e-3
                values.append(value.item())
                if values[-1] >= stop:
                    optimiser.zero_grad()
                    value.backward()
                    optimiser.step()
                    made += 1
            if sum(values) / 2 < stop:
                break
        torch.testing.assert_close(fitted.params["x"][i], x.detach(), atol=1e-12, rtol=0)
        assert int(fitted.steps[i]) == made
    assert fitted.steps[0] != fitted.steps[1]


@pytest.mark.parametrize("kind", [Dense, LowRank])
def test_training_by_entry_makes_one_stack_on_the_way_back(kind: type) -> None:
    """E entries of one row each: an indexed entry would cost a bank of zeros each, E² matrices together."""
    count, inner, outer = 6, 5, 4
    shapes = {"weight": (count, outer, inner)} if kind is Dense else {"down": (count, 2, inner), "up": (count, outer, 2)}
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for k, s in shapes.items()}
    x, y = (torch.randn((9, 3, n), generator=generator, dtype=torch.float64) for n in (inner, outer))
    rows = torch.tensor([4, 0, 1, 1, 2, 5, 3, 0, 4])
    by_entry = kind.apply_grouped(params, RowGroups.of(rows), {}, x, y, Site(0), None)
    copied = kind.apply({k: t[rows] for k, t in params.items()}, {}, x, y, Site(0), None)
    torch.testing.assert_close(by_entry, copied)
    names = set()
    todo = [by_entry.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node.name() not in ("IndexBackward0",):
            names.add(node.name())
            todo += [n for n, _ in node.next_functions]
    assert "UnbindBackward0" in names and "SelectBackward0" not in names
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), list(params.values())) for o in (by_entry, copied)), strict=True):
        torch.testing.assert_close(a, b)
