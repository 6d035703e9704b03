"""Rules of inner loops, each where its neighbour would decide otherwise: when a problem ends, what a batch leaves alone or gives back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from errata.core.fit import SGD, AdamW, fit, fit_epochs
from errata.core.tail import skip_blocks
from errata.score.intervals import bootstrap


def test_a_problem_ends_when_it_is_below_its_stop_and_has_come_to_rest_not_at_one_of_them() -> None:
    """Loss x² with x halved by each update: 16, 4, 1, ¼, 1/16; below 2 from the third on, by less than ½ only at the last.  The second
    problem never moves, and stays above."""

    def loss(p: dict[str, Tensor], alive: Tensor) -> tuple[Tensor, Tensor]:
        still = torch.tensor([0.0, 5.0])[alive]
        value = p["x"][:, 0].square() * (alive == 0) + still
        return value, value

    found = fit({"x": torch.tensor([[4.0], [4.0]])}, loss, steps=9, optimizer=SGD(lr=0.25), stop=2.0, max_change=0.5)
    assert found.steps.tolist() == [4, 9]
    assert found.loss.tolist() == [0.0625, 5.0] and found.params["x"].tolist() == [[0.25], [4.0]]
    (early,) = fit({"x": torch.tensor([[4.0]])}, loss, steps=9, optimizer=SGD(lr=0.25), stop=2.0).steps.tolist()
    assert early == 2, "without the second rule it ends as soon as it is below"


def test_a_mini_batch_without_a_row_of_a_problem_leaves_it_alone_whatever_its_stop() -> None:
    """At a stop of 0 a mean over no rows, 0, is not below it; weight decay would then move what nothing was said about."""
    seen = {0: torch.tensor([0]), 1: torch.tensor([1])}  # batch -> the problem whose rows it holds

    def loss(p: dict[str, Tensor], alive: Tensor, number: int, batch: int) -> tuple[Tensor, Tensor]:
        own = torch.isin(alive, seen[batch]).float()
        return (p["x"][:, 0] - 1).square() * own, own

    found = fit_epochs({"x": torch.full((2, 1), 3.0)}, loss, epochs=3, batches=2, optimizer=AdamW(lr=0.1, weight_decay=0.5), stop=0.0)
    alone = fit_epochs(
        {"x": torch.full((1, 1), 3.0)},
        lambda p, alive, number, batch: ((p["x"][:, 0] - 1).square(), torch.ones(1)),
        epochs=3, batches=1, optimizer=AdamW(lr=0.1, weight_decay=0.5), stop=0.0,
    )  # fmt: skip
    assert found.steps.tolist() == [3, 3]
    torch.testing.assert_close(found.params["x"], alone.params["x"].expand(2, 1))


def test_a_resample_that_says_nothing_moves_no_limit() -> None:
    """Values in one case of twenty: a third of the resamples draw it never, and are not 0 for that."""
    values = np.full(20, np.nan)
    values[3] = 0.8

    def mean(drawn: np.ndarray) -> np.ndarray:
        there = ~np.isnan(drawn)
        with np.errstate(invalid="ignore"):
            return np.where(there, drawn, 0.0).sum(-1) / there.sum(-1)

    assert bootstrap(values, 0, statistic=mean) == pytest.approx((0.8, 0.8))


def test_skipped_blocks_get_back_what_they_ran_before() -> None:
    """accelerate keeps its wrapper in the instance: a block that had one has it again, the others run their class's own."""
    blocks = [torch.nn.Linear(2, 2) for _ in range(3)]
    wrapper = blocks[1].forward
    blocks[1].forward = wrapper  # type: ignore[method-assign]
    hidden = torch.ones(1, 2)
    with skip_blocks(blocks, hidden, hidden):
        assert torch.equal(blocks[2](torch.zeros(1, 2)), hidden) and torch.equal(blocks[0](2 * hidden), 2 * hidden)
    assert ["forward" in vars(b) for b in blocks] == [False, True, False] and vars(blocks[1])["forward"] is wrapper
