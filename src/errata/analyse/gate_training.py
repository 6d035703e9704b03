"""Sequential edits made to be looked at: with and without BaFT's balancing loss, with and without its locality term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from errata.analyse.gate_statistics import pareto_front, unevenness
from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.errors import ConfigError
from errata.request import Case
from errata.run.scenarios import scorer
from errata.score.evaluator import AnswerCache
from errata.score.metrics import summarise

_RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the learning rate: what a reliability-locality curve goes along
METRICS = ("reliability", "locality_agreement")

Progress = Callable[[str, int, int], None]


@dataclass
class GateRun:
    """One continual run: the stack at each mark, and of each edit its mean gate weights {block: w [r]}."""

    stacks: dict[int, Stack] = field(default_factory=dict)
    weights: list[dict[int, np.ndarray]] = field(default_factory=list)


def run_continual(
    lm: LM, editor: Any, cases: Sequence[Case], marks: Sequence[int], progress: Progress | None = None, stage: str = "editing"
) -> GateRun:
    """Edit the cases one after another on the growing stack."""
    out = GateRun()
    stack: Stack = ()
    before: dict[str, np.ndarray] = {}
    for t, case in enumerate(cases[: max(marks)], 1):
        stack = active_patches((*stack, editor.edit(lm, list(case.requests), on=stack)))
        sums = {k: v.double().cpu().numpy() for k, v in stack[-1].state.items() if k.startswith("weights.")}
        out.weights.append({int(k.partition(".")[2]): v - before.get(k, 0.0) for k, v in sums.items()})
        before = sums
        if t in marks:
            out.stacks[t] = stack
        if progress:
            progress(stage, t, max(marks))
    return out


def records(
    lm: LM, grown: GateRun, cases: Sequence[Case], method: str, answers: AnswerCache, progress: Progress | None = None
) -> dict[int, Any]:
    """{T: records of cases 1..T on the stack after T edits}."""
    score = scorer(lm, method, progress, answers)
    return {t: score(cases[:t], [stack] * t) for t, stack in grown.stacks.items()}


def curve(grown: GateRun, variant: str) -> list[dict[str, Any]]:
    """After each edit t, of the running mean weights w̄_k(t) of each block: their variance over bases, and that over their mean squared."""
    out = []
    for block in grown.weights[0] if grown.weights else ():
        w = np.stack([own[block] for own in grown.weights])
        running = w.cumsum(0) / np.arange(1, len(w) + 1)[:, None]
        for t, means in enumerate(running, 1):
            variance, ratio = unevenness(means)
            out.append({"variant": variant, "block": block, "t": t, "variance": variance, "squared_cv": ratio, "mean": float(means.mean())})
    return out


def balance(lm: LM, editor: Any, cases: Sequence[Case], done: GateRun, progress: Progress | None = None) -> list[dict[str, Any]]:
    """`curve` with and without the balancing loss; ``done`` is the run with the editor as it is."""
    if editor.gate == "subspace":
        raise ConfigError("with gate=subspace there is one weight and nothing to balance; leave 'balance' out of --compare")
    _check_trained(editor, cases, "balance")
    name = ("with", "without")
    other = run_continual(lm, replace(editor, balance=not editor.balance), cases, [len(cases)], progress, "editing, balancing turned over")
    return [*curve(done, name[not editor.balance]), *curve(other, name[editor.balance])]


def locality(
    lm: LM, editor: Any, cases: Sequence[Case], answers: AnswerCache, progress: Progress | None = None, rates: Sequence[float] = _RATES
) -> list[dict[str, Any]]:
    """Reliability and locality (teacher-forced) after all edits, with and without the locality term, along learning rates; which of
    each variant's points are on its own front, and which on the front of all."""
    if not any(r.unrelated for case in cases for r in case.requests):
        raise ConfigError("no case brings unrelated texts, so the locality term has nothing to act on; leave 'locality' out of --compare")
    _check_trained(editor, cases, "locality")
    out = []
    for variant, term in (("with", True), ("without", False)):
        for rate in rates:
            own = replace(editor, locality=term, lr=editor.lr * rate)
            grown = run_continual(lm, own, cases, [len(cases)], progress, f"editing, {variant} the locality term, rate × {rate:g}")
            rows = summarise(records(lm, grown, cases, variant, answers, progress)[len(cases)])
            found = {r["metric"]: r for r in rows if r["protocol"] == "teacher_forced" and r["metric"] in METRICS}
            if len(found) < len(METRICS):
                raise ConfigError("the cases have no facts that should stay; leave 'locality' out of --compare")
            out.append({"variant": variant, "lr": own.lr, **{m: {k: found[m][k] for k in ("value", "low", "high")} for m in METRICS}})
    fronts = {v: iter(pareto_front([_point(r) for r in out if r["variant"] == v])) for v in ("with", "without")}
    every = pareto_front([_point(r) for r in out])
    return [{**row, "front": next(fronts[row["variant"]]), "front_of_all": best} for row, best in zip(out, every, strict=True)]


def _check_trained(editor: Any, cases: Sequence[Case], what: str) -> None:
    """The two losses act on gates alone."""
    if any(editor.suited(case.requests).keeps_gates for case in cases):
        raise ConfigError(f"these gates are solved, not trained, so {what!r} has nothing to act on; add --set train_gates=true")


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["reliability"]["value"], row["locality_agreement"]["value"]
