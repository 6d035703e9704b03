"""The search: one setting after the other, each value on the same facts, kept where it is better by more than chance.

S of some settings is the harmonic mean of three shares, each a mean over cases:

    reliability   the free answer to the edited prompt begins with the new object
    generality    the same of other ways to ask
    kept          the nearest subjects, which no editor is shown, are answered with the same first word (`errata.score.neighbours`)

A share of 0 counts as half a case, so that a method that never generalises can still be told from a worse one.  A value is taken where S
rises by more than the standard error of its paired difference over cases.  Every trial is a line of the journal as soon as it is made: a
search that was stopped goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from errata import __version__, registry
from errata.config import digest, to_dict
from errata.core.model import LM
from errata.errors import ConfigError, FitError
from errata.request import Case
from errata.run import single
from errata.score.evaluator import AnswerCache
from errata.score.metrics import case_values
from errata.storage import disk_errors
from errata.tune.space import values_of

SHARES: Final = {"reliability": "reliability", "generality": "generality", "kept": "watch"}
_RESAMPLES: Final = 500


@dataclass(frozen=True)
class Trial:
    """Settings on top of the rule, and what they came to; ``values`` {share: {case: value}}.  ``failed`` says why there are none."""

    settings: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    seconds: float
    failed: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """The three means; NaN for one that no case has."""
        return {name: float(np.mean(list(own.values()))) if own else float("nan") for name, own in self.values.items()}

    @property
    def score(self) -> float:
        """S."""
        return 0.0 if self.failed else float(_harmonic(_columns(self))[0])

    def to_dict(self) -> dict[str, Any]:
        out = {"settings": dict(self.settings), "seconds": round(self.seconds, 2), "S": round(self.score, 4)}
        return out | (
            {"failed": self.failed} if self.failed else {k: None if math.isnan(v) else round(v, 4) for k, v in self.shares.items()}
        )


def _columns(trial: Trial) -> Any:
    """[1, cases, 3]; NaN where a case has no such probe."""
    cases = sorted({case for own in trial.values.values() for case in own})
    return np.array([[[trial.values[name].get(case, np.nan) for name in SHARES] for case in cases]])


def _harmonic(drawn: Any) -> Any:
    """[R, cases, 3] -> S [R]; a share that no case has is left out."""
    there = ~np.isnan(drawn)
    count = there.sum(1)
    means = np.where(there, drawn, 0).sum(1) / np.maximum(count, 1)
    inverse = np.where(count > 0, 1 / np.maximum(means, 0.5 / drawn.shape[1]), 0)
    return (count > 0).sum(1) / inverse.sum(1)


def gain(new: Trial, old: Trial, seed: int = 0) -> tuple[float, float]:
    """(S of new − S of old, its standard error over cases, by a paired bootstrap)."""
    if new.failed or old.failed:
        return new.score - old.score, 0.0
    a, b = _columns(new)[0], _columns(old)[0]
    drawn = np.random.default_rng(seed).integers(0, len(a), (_RESAMPLES, len(a)))
    return new.score - old.score, float((_harmonic(a[drawn]) - _harmonic(b[drawn])).std())


@dataclass
class Evaluation:
    """Settings of methods on some cases of a model; what was asked of the base is asked once, what was tried is in the journal."""

    lm: LM
    cases: Sequence[Case]
    journal: Path
    answers: AnswerCache = field(default_factory=AnswerCache)
    _known: dict[str, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = digest([self.lm.fingerprint, [[c.id, [p.prompt for p in c.probes]] for c in self.cases]])
        for line in self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else ():
            try:
                found = json.loads(line)
                self._known[found["key"]] = Trial(found["settings"], found["values"], found["seconds"], found["failed"])
            except (ValueError, KeyError):
                continue  # a line that a kill cut short

    def trial(self, method: str, settings: Mapping[str, Any], progress: Any = None) -> Trial:
        """What these settings, on top of the rule, come to."""
        kind = registry.get("method", method)
        editor = kind.untuned(self.lm, **settings)
        key = digest([__version__, self.name, method, to_dict(editor), str(self.lm.dtype)])
        if key not in self._known:
            self._known[key] = made = self._make(method, editor, settings, progress)
            line = {"key": key, "method": method, "settings": dict(settings), "values": made.values, "seconds": made.seconds}
            self._write(json.dumps({**line, "failed": made.failed}))
        return self._known[key]

    def _write(self, line: str) -> None:
        """At the journal's end, on the disk; behind a line that a kill cut short it begins a new one."""
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(self.journal), open(self.journal, "a+b") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read() == b"\n" else f"\n{line}"
            stream.write(f"{line}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _make(self, method: str, editor: Any, settings: Mapping[str, Any], progress: Any) -> Trial:
        began = time.perf_counter()
        try:
            if hasattr(editor, "prepare"):
                editor.prepare(self.lm)
            _, records = single(self.lm, editor, self.cases, progress, self.answers, method)
        except (FitError, ConfigError) as error:
            return Trial(settings, {name: {} for name in SHARES}, time.perf_counter() - began, str(error))
        values = {name: case_values(records, metric, "starts") for name, metric in SHARES.items()}
        return Trial(settings, values, time.perf_counter() - began)


@dataclass
class Search:
    """One method's search within ``seconds``; ``told`` hears of every trial, and whether it was taken."""

    evaluation: Evaluation
    method: str
    seconds: float
    traced: Callable[[], int | None]
    told: Callable[[str, Trial, bool], None]
    progress: Any = None
    trials: list[Trial] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)  # what there was no time for

    def run(self) -> Trial:
        """The best trial."""
        lm, spent = self.evaluation.lm, 0.0
        kind = registry.get("method", self.method)
        best = self._try({})
        self.told(self.method, best, True)
        spent = longest = best.seconds
        for name, tries in kind.TUNES.items():
            now = value_now(kind.untuned(lm, **best.settings), name, lm)
            for value in values_of(name, tries, now, lm.depth, self.traced() if "trace" in tries else None):
                chosen = value if isinstance(value, dict) else {name: value}
                if spent + longest > self.seconds:
                    self.cut.append(", ".join(f"{k}={v}" for k, v in chosen.items()))
                    continue
                trial = self._try({**best.settings, **chosen})
                spent, longest = spent + trial.seconds, max(longest, trial.seconds)
                more, error = gain(trial, best)
                if more > error:
                    best = trial
                self.told(self.method, trial, best is trial)
        return best

    def _try(self, settings: Mapping[str, Any]) -> Trial:
        trial = self.evaluation.trial(self.method, settings, self.progress)
        self.trials.append(trial)
        return trial


def value_now(editor: Any, name: str, lm: LM) -> Any:
    """The value of an editor's setting; of blocks that are left to the rule, those that it chooses."""
    value = getattr(editor, name, None)
    if name == "layers" and value is None:
        value = editor.target_layers(lm)
    return list(value) if isinstance(value, tuple) else value
