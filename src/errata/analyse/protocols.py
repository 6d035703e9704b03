"""How the papers whose figures `errata.published` holds measured, run on any model: windows of edits, single edits, what comes after.

A *window* is T edits (or batches of edits) made one after another from the unedited model, scored when the last is made.  As many
disjoint windows of each T as the cases allow are run, so that T = 1 and T = 10 rest on as many cases as T = 100; the papers do not
say how they averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errata.analyse import gates
from errata.benchmarks.downstream import MultipleChoice
from errata.core.bank import Stack, active_patches
from errata.core.model import LM
from errata.request import LOCAL_KINDS, Case
from errata.score import downstream, intervals, robustness
from errata.score.evaluator import AnswerCache, score
from errata.score.metrics import case_values, get_metric

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]

# column of a published table -> (metric, protocol); a row's average is over exactly these
_RELIABILITY, _LOCALITY = ("reliability", "teacher_forced"), ("locality_agreement", "teacher_forced")
SEQUENTIAL = {"reliability": _RELIABILITY, "generality": ("generality", "teacher_forced"), "locality": _LOCALITY}
SINGLE = {"reliability": _RELIABILITY, "portability": ("portability", "teacher_forced"), "locality": _LOCALITY}
SENTIMENT = {"reliability": ("sentiment", "likelihood")}  # ConvSent's
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # M of BaFT's Fig. 1
REP = {  # column -> the code's score
    "success": "success",
    "paraphrase": "rephrase_id",
    "scrambled": "shuffle_id",
    "long_context": "long_acc",
    "paraphrase_unseen": "rephrase_od",
}


@dataclass
class Measured:
    """rows: method, part, benchmark, maybe T, batch, windows, n, and ``figures`` {column: value, low, high}; records: one a probe;
    weights, redundancy: what Figs. 2 and 1 draw."""

    rows: list[Row] = field(default_factory=list)
    records: list[Row] = field(default_factory=list)
    weights: list[Row] = field(default_factory=list)
    redundancy: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Measurement:
    """What every protocol needs.  ``answers``: the base is asked once."""

    lm: LM
    progress: Progress
    into: Measured = field(default_factory=Measured)
    answers: AnswerCache = field(default_factory=AnswerCache)

    def score(self, cases: Sequence[Case], stacks: Sequence[Stack], method: str) -> list[Row]:
        """Records of each case on its stack."""
        return score(self.lm, cases, stacks, method, lambda done, of: self.progress(f"{method}: scoring", done, of), self.answers)

    def keep(self, found: Sequence[Row], wanted: Mapping[str, tuple[str, str]], by_kind: bool = False, **row: Any) -> None:
        """A row of figures from records.  ``by_kind``: see `errata.score.metrics.case_values`."""
        means = {column: case_values(found, *which, by_kind) for column, which in wanted.items()}
        shares = all(get_metric(metric).share for metric, _ in wanted.values())
        figures = _figures({column: values for column, values in means.items() if values}, shares)
        self.into.rows.append({**row, "n": len({r["case"] for r in found}), "figures": figures})
        self.into.records += [{**r, **{k: row[k] for k in ("part", "T", "batch") if k in row}} for r in found]


def _figures(means: Mapping[str, Mapping[str, float]], shares: bool) -> dict[str, dict[str, float]]:
    """{column: value, low, high} from {column: {case: value}}; of several columns also the average, with an interval of its own: the
    columns of a case rise and fall together, so cases are drawn, not columns."""
    cases = sorted({case for values in means.values() for case in values})
    table = np.array([[values.get(case, np.nan) for values in means.values()] for case in cases])
    out = {}
    for i, column in enumerate(means):
        own = table[:, i][~np.isnan(table[:, i])]
        low, high = intervals.share(own, 0) if shares else intervals.bootstrap(own, 0)
        out[column] = {"value": float(own.mean()), "low": low, "high": high}
    if len(means) > 1:
        low, high = intervals.bootstrap(table, 0, statistic=_average)
        if shares:
            low, high = intervals.at_the_edge((low, high), *table.T, statistic=lambda limits: float(limits.mean()))
        out["average"] = {"value": float(_average(table)), "low": low, "high": high}
    return out


def _average(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """[…, cases, columns] -> […]: the mean of the columns' means, each over the cases that have it; NaN where one has none."""
    there = ~np.isnan(drawn)
    count = there.sum(axis=-2)
    means = np.divide(np.where(there, drawn, 0.0).sum(axis=-2), count, out=np.full(count.shape, np.nan), where=count > 0)
    out: NDArray[np.float64] = means.mean(axis=-1)
    return out


def _stack_of(lm: LM, editor: Any, cases: Sequence[Case], batch: int, told: Callable[[int], None]) -> Stack:
    """The cases edited in joint edits of ``batch``, one after another."""
    stack: Stack = ()
    for start in range(0, len(cases), batch):
        requests = [r for c in cases[start : start + batch] for r in c.requests]
        stack = active_patches((*stack, editor.edit(lm, requests, on=stack)))
        told(min(batch, len(cases) - start))
    return stack


def windows(
    job: Measurement, method: str, editor: Any, cases: Sequence[Case], t: int, batch: int = 1, **row: Any
) -> list[tuple[list[Case], Stack]]:
    """Score disjoint windows of t edits of ``batch`` cases; their cases and final stacks."""
    size = t * batch
    parts = [list(cases[i : i + size]) for i in range(0, len(cases) - size + 1, size)]
    done, total = 0, size * len(parts)

    def told(count: int) -> None:
        nonlocal done
        done += count
        job.progress(f"{method}: editing, T = {t}", done, total)

    if size == 1 and all(not c.more for c in cases):
        stacks = _each(job.lm, editor, cases)
    else:
        stacks = [_stack_of(job.lm, editor, part, batch, told) for part in parts]
    asked = [c for part in parts for c in part]
    on = [stack for part, stack in zip(parts, stacks, strict=True) for _ in part]
    found = job.score(asked, on, method)
    more: dict[str, Any] = {**({"batch": batch} if batch > 1 else {}), **row}
    job.keep(found, SEQUENTIAL, method=method, T=t, windows=len(parts), **more)
    return list(zip(parts, stacks, strict=True))


def sequential(
    job: Measurement, editors: Mapping[str, Any], cases: Sequence[Case], marks: Sequence[int], batch: int = 1, **row: Any
) -> None:
    """Continual (``batch`` 1) or batched editing at each T that the cases allow."""
    for t in marks:
        if t * batch > len(cases):
            of = "" if batch == 1 else f", batches of {batch}"
            job.into.left_out.append(f"T = {t}{of}: needs {t * batch} cases, there are {len(cases)}")
            continue
        for name, editor in editors.items():
            windows(job, name, editor, cases, t, batch, **row)


def single(job: Measurement, editors: Mapping[str, Any], cases: Sequence[Case], sentiment: bool, **row: Any) -> None:
    """Each case alone."""
    for name, editor in editors.items():
        found = job.score(cases, _each(job.lm, editor, cases), name)
        job.keep(found, SENTIMENT if sentiment else SINGLE, by_kind=True, method=name, **row)


def _each(lm: LM, editor: Any, cases: Sequence[Case]) -> list[Stack]:
    """A stack a case, of the one patch that makes its change."""
    if any(c.more for c in cases):
        return [(editor.edit(lm, list(c.requests)),) for c in cases]
    return [(patch,) for patch in editor.edit_each(lm, [c.request for c in cases])]


def _choosing(job: Measurement, name: str, done: int, of: int) -> None:
    job.progress(f"{name}: choosing", done, of)


def choosing(job: Measurement, editors: Mapping[str, Any], cases: Sequence[Case], items: Sequence[MultipleChoice], **row: Any) -> None:
    """Accuracy of choices after all cases were edited one after another; the unedited model is the row "none"."""
    first = True
    for name, editor in editors.items():
        stack = _stack_of(job.lm, editor, cases, 1, lambda count: None)
        told = functools.partial(_choosing, job, name)
        found = downstream.choices(job.lm, items, stack, name, job.answers, told)
        if first:
            bare = [{**r, "method": "none", "right_after": r["right_before"], "nll_after": r["nll_before"]} for r in found]
            job.keep(bare, {"accuracy": ("choices", "likelihood")}, method="none", T=len(cases), **row)
        job.keep(found, {"accuracy": ("choices", "likelihood")}, method=name, T=len(cases), **row)
        first = False


def choices_of(cases: Sequence[Case]) -> list[MultipleChoice]:
    """Facts that should stay as choices: their own answer against the new one of the edit beside them."""
    seen: dict[str, MultipleChoice] = {}
    for i, case in enumerate(cases):
        for probe in case.probes:
            if probe.kind in LOCAL_KINDS and probe.target and probe.target != case.request.target:
                pair = (probe.target, case.request.target)
                right = i % 2  # so that the first is not always right
                seen.setdefault(probe.prompt, MultipleChoice(probe.prompt, pair[::-1] if right else pair, right))
    return list(seen.values())


def robust(job: Measurement, editors: Mapping[str, Any], cases: Sequence[Case], **row: Any) -> None:
    """REP's own averages over each case alone, under other names, shuffles and long contexts."""
    wide = robustness.add_robustness_probes(job.lm, cases)
    if missing := robustness.unasked(wide):
        job.into.left_out.append(f"not asked, since the model's window is too short: {', '.join(missing)}")
    kinds = {"rewrite", *robustness.PAPER.values()}
    asked = [Case(c.request, tuple(p for p in c.probes if p.kind in kinds), c.more) for c in wide]
    for name, editor in editors.items():
        found = job.score(asked, _each(job.lm, editor, asked), name)
        at = {a["score"]: a["value"] for a in robustness.micro_averages(found)}
        figures = {c: {"value": at[s], "low": None, "high": None} for c, s in REP.items() if s in at}
        job.into.rows.append({**row, "method": name, "n": len(cases), "figures": figures})
        job.into.records += found


def redundancy(job: Measurement, editors: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Of each edit's r dimensions, how many have an update below M times the largest: |w ∘ (A h + b − R h)| on the edited prompt and its
    answer, mean over the tokens acted on; mean and standard deviation over edits, a row a method, block and M."""
    for name, editor in editors.items():
        stacks = _each(job.lm, editor, cases)
        inputs = [gates.GateInputs(c.id, (("edited", c.request.prompt, c.request.target),), s) for c, s in zip(cases, stacks, strict=True)]
        found = gates.read(job.lm, inputs, None, "update")
        for block in sorted({f.block for f in found}):
            moved = np.stack([f.w for f in gates.of(found, None, block)])
            for share in SHARES:
                counts = (moved < share * moved.max(1, keepdims=True)).sum(1)
                counted = {"count": float(counts.mean()), "sd": float(counts.std()), "rank": moved.shape[1], "n": len(moved)}
                job.into.redundancy.append({"method": name, "block": block, "M": share, **counted})
