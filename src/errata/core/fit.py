"""`fit`: E independent problems optimised in one batch, each stopping by itself.  `fit_epochs`: the same in mini-batches.

The update rules act on each number alone, so E problems stacked along the first axis train exactly as they would one at a time.
A finished problem is taken out of the batch; the others go on in a smaller one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from errata.errors import FitError

# (parameters of the problems still running, their indices [e]) -> (loss to minimise [e], loss compared with the stop [e])
Loss = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]
After = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor, int], None]


class BatchLoss(Protocol):
    """(…, number of the pass, of the mini-batch) -> (mean loss over each problem's rows of it [e], how many rows those are [e])."""

    def __call__(self, p: Mapping[str, Tensor], alive: Tensor, *, number: int, batch: int) -> tuple[Tensor, Tensor]: ...


@dataclass
class FitResult:
    """params [E, …]; steps [E] updates made; loss [E] the last value compared with the stop."""

    params: dict[str, Tensor]
    steps: Tensor
    loss: Tensor


class Optimizer(Protocol):
    """An update rule, on each number alone, that keeps ``moments`` numbers for each."""

    moments: ClassVar[int]

    def update(self, p: list[Tensor], gradient: list[Tensor], *moments: list[Tensor], step: int | Sequence[int]) -> None:
        """Update number ``step`` (from 1; one for all, or one each) of the tensors and their moments, in place."""


@dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2019; torch's defaults but for the decay.  One pass over memory (torch's fused kernel).

    schedule    factor of ``lr`` at an update, by its number (from 1)
    """

    moments: ClassVar[int] = 2

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Callable[[int], float] = lambda step: 1.0

    def update(self, p: list[Tensor], gradient: list[Tensor], *moments: list[Tensor], step: int | Sequence[int]) -> None:
        """The kernel reads memory in order whatever a tensor's strides are, and a matrix product's gradient may come transposed.  The rate
        is that of the first one's step: a ``schedule`` needs one step for all."""
        first, second = moments
        steps = [step] * len(p) if isinstance(step, int) else step
        adamw(
            p, [g.contiguous() for g in gradient], first, second, [],
            [torch.tensor(float(n - 1), device=t.device) for t, n in zip(p, steps, strict=True)],
            fused=True, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=self.lr * self.schedule(steps[0]),
            weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True)
class SGD:
    """p ← p − lr (gradient + weight_decay p)."""

    lr: float
    weight_decay: float = 0.0
    moments: ClassVar[int] = 0

    def update(self, p: list[Tensor], gradient: list[Tensor], *moments: list[Tensor], step: int | Sequence[int]) -> None:
        for own, slope in zip(p, gradient, strict=True):
            own.mul_(1.0 - self.lr * self.weight_decay).sub_(slope, alpha=self.lr)


def _evaluate(loss: Loss, leaves: Mapping[str, Tensor], alive: Tensor, count: int, step: int) -> tuple[Tensor, Tensor]:
    """The loss and what is compared with the stop; `FitError` names the problem that went wrong."""
    try:
        total, compared = loss(leaves, alive)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise FitError(f"the parameters grew until no basis could be made of them at step {step}; lower the learning rate") from None
    broken = (~torch.isfinite(total.detach())).nonzero().flatten()
    if len(broken):
        raise FitError(
            f"problem {int(alive[broken[0]])} of {count}: the loss became NaN or infinite at step {step}; lower the learning rate"
        )
    return total, compared.detach().float()


def fit(
    params: Mapping[str, Tensor],
    loss: Loss,
    *,
    steps: int,
    optimizer: Optimizer,
    stop: float | None = None,
    max_change: float | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    project: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
    after_step: After | None = None,
) -> FitResult:
    """Up to ``steps`` updates of each problem; problem e ends when its compared loss is below ``stop``, and, with ``max_change``, is also
    no further than that from its value a step before.

    ``project(params, alive)`` puts parameters back into their bounds, in place, after each update; ``after_step(params, gradients,
    alive, step)`` follows, for what needs to know more (update number ``step``, from 1; gradients from before it).

    ``progress(step, running, mean loss)`` is called once a step.  Raises `FitError` when a loss is not finite.
    """
    some = next(iter(params.values()))
    count, device = some.shape[0], some.device
    final = {k: p.detach().clone() for k, p in params.items()}
    made, last = torch.zeros(count, dtype=torch.long, device=device), torch.full((count,), torch.inf, device=device)
    alive = torch.arange(count, device=device)
    now = {k: p.detach().clone() for k, p in params.items()}
    moments = [{k: torch.zeros_like(p) for k, p in now.items()} for _ in range(optimizer.moments)]
    for step in range(1, steps + 2):  # the last round only measures
        leaves = {k: p.requires_grad_(True) for k, p in now.items()}
        total, compared = _evaluate(loss, leaves, alive, count, step)
        moved, last[alive] = (compared - last[alive]).abs(), compared
        if progress is not None:
            progress(step, len(alive), float(compared.mean()))
        keep = compared >= stop if stop is not None else torch.ones_like(alive, dtype=torch.bool)
        if max_change is not None:
            keep = keep | (moved > max_change)
        if step > steps or not bool(keep.any()):
            break
        gradients = dict(zip(leaves, torch.autograd.grad(total.sum(), list(leaves.values())), strict=True))
        now = {k: p.detach() for k, p in now.items()}
        if not bool(keep.all()):  # the finished leave with the parameters that met the stop
            for k in now:
                final[k][alive[~keep]] = now[k][~keep]
                for own in (now, gradients, *moments):
                    own[k] = own[k][keep]
            alive = alive[keep]
        made[alive] = step
        values = [list(d.values()) for d in (now, gradients, *moments)]
        optimizer.update(values[0], values[1], *values[2:], step=step)
        if project is not None:
            project(now, alive)
        if after_step is not None:
            after_step(now, gradients, alive, step)
    for k in now:
        final[k][alive] = now[k].detach()
    return FitResult(final, made, last)


class _Running:
    """The problems of `fit_epochs` that still run: parameters and moments [e, …], and the updates each has had."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.now = {k: p.detach().clone() for k, p in params.items()}
        self.final = {k: torch.empty_like(p) for k, p in self.now.items()}
        self.first, self.second = ({k: torch.zeros_like(p) for k, p in self.now.items()} for _ in range(2))
        some = next(iter(self.now.values()))
        self.alive = torch.arange(len(some), device=some.device)
        self.updates = [0] * len(some)
        self.made = torch.zeros_like(self.alive)

    def leaves(self) -> dict[str, Tensor]:
        return {k: p.detach().requires_grad_(True) for k, p in self.now.items()}

    def update(self, rule: AdamW, gradients: Sequence[Tensor], which: Sequence[int]) -> None:
        """An update of some of them, each with its own count: a skipped one leaves the moments as they are too."""
        for i in which:
            self.updates[i] += 1
        lists = (self.now.values(), gradients, self.first.values(), self.second.values())
        p, g, m, v = ([t[i] for t in tensors for i in which] for tensors in lists)
        rule.update(p, g, m, v, step=[self.updates[i] for _ in gradients for i in which])

    def retire(self, done: Tensor) -> None:
        """Take problems out of the batch."""
        kept = ~done
        self.made[self.alive] = torch.tensor(self.updates, device=done.device)
        for k, p in self.now.items():
            self.final[k][self.alive[done]] = p[done]
            self.now[k], self.first[k], self.second[k] = p[kept], self.first[k][kept], self.second[k][kept]
        self.alive = self.alive[kept]
        self.updates = self.made[self.alive].tolist()


def fit_epochs(
    params: Mapping[str, Tensor],
    loss: BatchLoss,
    *,
    epochs: int,
    batches: int,
    optimizer: AdamW,
    stop: float,
    progress: Callable[[int, int, float], None] | None = None,
    project: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
) -> FitResult:
    """Up to ``epochs`` passes over ``batches`` mini-batches, an update each: what fine-tuning editors do, for E problems at once.

    A mini-batch leaves a problem alone that has no row in it or whose mean loss is below ``stop``; a problem ends with the pass whose
    mean loss over all rows is.  `FitResult.steps` counts updates, `FitResult.loss` is the last pass's.  Otherwise as `fit`.
    """
    running = _Running(params)
    count, device = len(running.alive), running.alive.device
    last = torch.full((count,), torch.inf, device=device)
    for number in range(epochs):
        summed, rows = torch.zeros(len(running.alive), device=device), torch.zeros(len(running.alive), device=device)
        for batch in range(batches):
            step, leaves = number * batches + batch + 1, running.leaves()
            total, own = _evaluate(functools.partial(loss, number=number, batch=batch), leaves, running.alive, count, step)
            summed, rows = summed + total.detach().float() * own, rows + own
            if progress is not None:
                progress(step, len(running.alive), float(summed.sum() / rows.sum().clamp_min(1)))
            which = ((total.detach() >= stop) & (own > 0)).nonzero().flatten().tolist()  # waits for the device, once an update
            if which:
                running.update(optimizer, torch.autograd.grad(total.sum(), list(leaves.values())), which)
                if project is not None:
                    project(running.now, running.alive)
        last[running.alive] = summed / rows
        done = summed / rows < stop
        if number + 1 == epochs or bool(done.all()):
            break
        if bool(done.any()):
            running.retire(done)
    running.retire(torch.ones_like(running.alive, dtype=torch.bool))
    return FitResult(running.final, running.made, last)


class _TokenNLL(torch.autograd.Function):
    """−log softmax at the labels.  [M, V] numbers are made once, on the way in, and turned into the gradient in place on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        ctx.labels, ctx.log_p = labels, log_p
        return -log_p.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = ctx.log_p.exp_().mul_(gradient[:, None])
        out.scatter_add_(1, ctx.labels[:, None], -gradient[:, None])
        return out, None


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[M]: negative log-likelihood of ``labels`` [M] under ``logits`` [M, V], natural logarithm."""
    out: Tensor = _TokenNLL.apply(logits, labels)  # type: ignore[no-untyped-call]
    return out
