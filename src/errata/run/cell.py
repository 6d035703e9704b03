"""One cell of the grid, part by part on disk; begun or gone on with, it ends with the same bytes.

A cell's folder (see `errata.run.folder`), and when it is complete: ``summary.json`` (metrics with intervals, retention, forgetting by age,
what the guard found) and ``cost.json`` (seconds by kind of work, peak memory, numbers and bytes of patches, decoding time).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from errata.config import digest, to_dict
from errata.core.bank import Stack
from errata.core.model import LM
from errata.errors import StorageError
from errata.request import Case
from errata.run import base_answers, grid, summary
from errata.run.folder import DONE, Journal, PatchFolder, document, locked, read_document
from errata.run.guard import HealthGuard
from errata.run.parts import Clock, Part, Progress, Records, ResumeState, Score, alone
from errata.run.sequential import SequentialConfig, SequentialRun
from errata.score import cost, generation, judges
from errata.score.evaluator import score

RIGHT_AFTER = "right after its own"
_SAMPLE = 8  # patches of single edits whose size and speed are looked at
CELL = "cell.json"


@dataclasses.dataclass
class CellRunner:
    """What a cell needs to run."""

    lm: LM
    spec: grid.RunSpec
    cell: grid.Cell
    folder: Path
    base: Path
    judged: Path
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.editor = grid.editor(self.cell, self.lm.fingerprint)
        self.source = grid.benchmark(self.cell.benchmark)
        self.left_out: Counter[str] = Counter()
        self.cases: list[Case] = base_answers.cases_of(self.lm, self.spec, self.cell, self.base, self.source, self.left_out)
        self.marks = self.cell.scenario.at(len(self.cases))
        self.single = self.cell.scenario.kind == "single"
        made = (judges.make(j.name, self.judged, j.endpoint, j.model, j.key_env) for j in self.spec.score.judges)
        self.judges = [j for j in made if j is not None]
        self.patches = PatchFolder(self.folder / "patches")
        self.numbers: dict[str, int] = {}  # id of a patch -> the T it was made at

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, loading: float = 0.0) -> None:
        """Do what is left.  ``loading``: seconds that the model took."""
        with locked(self.folder):
            journal = Journal(self.folder)
            journal.sweep()
            self._same_cell()
            if journal.complete:
                return
            clock = Clock({"loading": loading})
            answers = clock.run(
                "asking the base", lambda: base_answers.ask(self.lm, self.cases, self.base, self.spec.store.chunk, self._told)
            )
            clock.run("preparing", lambda: self.editor.prepare(self.lm) if hasattr(self.editor, "prepare") else None)
            at = self._resume(journal)
            if not journal.entries:
                journal.time("beginning", clock.spent)
            cost.reset_peak(self.lm.device)
            for part in self._parts(at, self._scorer(answers)):
                self._commit(journal, part)
            self._finish(journal)

    def _same_cell(self) -> None:
        """An error where the folder was begun with another model, other cases or other settings."""
        now = {
            "cell": self.cell.to_dict(),
            "settings": to_dict(self.editor),
            **base_answers.who(self.lm, self.cases),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
        }
        path = self.folder / CELL
        if not path.exists():
            document(path, now)
            return
        then = read_document(path)
        base_answers.same(self.folder, then, now)
        if digest(then.get("settings")) != digest(now["settings"]):
            raise StorageError(f"{self.folder}: the method's settings are not those it was begun with; give another --out")

    def _told(self, done: int, total: int) -> None:
        if self.progress:
            self.progress("scoring", done, total)

    def _scorer(self, answers: Any) -> Score:
        """Each part starts from the base's answers alone: its batches do not depend on what was scored before in this process."""

        def scored(cases: Sequence[Case], stacks: Sequence[Stack]) -> Records:
            kept = base_answers.copied(answers, self.spec.score.free_tokens)
            return judges.judge(score(self.lm, cases, stacks, self.cell.method.label, self._told, kept), self.judges)

        return scored

    def _parts(self, at: ResumeState, scored: Score) -> Iterator[Part]:
        store, scenario = self.spec.store, self.cell.scenario
        if self.single:
            yield from alone(self.lm, self.editor, self.cases, scored, store.chunk, at, self.progress)
            return
        guard = HealthGuard(self.lm, self.spec.guard) if self.spec.guard else None
        how = SequentialConfig(scenario.size or 1, self.marks, store.group, store.chunk, self.spec.score.right_after)
        yield from SequentialRun(self.lm, self.editor, self.cases, scored, how, guard, self.progress).parts(at)

    # -- on disk -----------------------------------------------------------------------------------------------

    def _commit(self, journal: Journal, part: Part) -> None:
        """Patches, then records, then the line that vouches for them; then what nobody needs any more goes."""
        clock = Clock(dict(part.seconds))
        if self.single:
            keep = self.spec.store.patches == "keep"
            made = [(t, p) for t, p in part.made if keep or t <= _SAMPLE]
            clock.run("saving", lambda: self.patches.save(made))
            clock.run("saving", lambda: journal.add(part.name, part.records, edits=part.edits, made=[t for t, _ in made]))
        elif part.mark is not None:
            records = [{**r, "edits": part.mark} for r in part.records]
            clock.run("saving", lambda: journal.add(part.name, records, edits=part.edits, mark=part.mark))
        else:
            self.numbers |= {p.id: t for t, p in part.made}
            on = {self.numbers[p.id] for p in part.stack}
            made = [(t, p) for t, p in part.made if t in on]
            clock.run("saving", lambda: self.patches.save(made))
            gone = [t for t in live_edits(journal.entries) if t not in on]
            more: dict[str, Any] = {"edits": part.edits, "made": [t for t, _ in made], "gone": gone}
            more |= {"undone": {str(i): why for i, why in part.undone.items()}} if part.undone else {}
            more |= {"health": part.health.to_dict()} if part.health else {}
            more |= {"stopped": True} if part.stopped else {}
            records = [{**r, "edits": RIGHT_AFTER} for r in part.records]
            clock.run("saving", lambda: journal.add(part.name, records, **more))
            self.patches.keep(self._needed(journal))
        journal.time(part.name, clock.spent)

    def _needed(self, journal: Journal) -> set[int]:
        """T of the patches that are on now, and (where they are kept) of those that were on at a mark."""
        needed = set(live_edits(journal.entries))
        if self.spec.store.patches == "keep":
            for i, entry in enumerate(journal.entries):
                if "made" in entry and (entry["edits"] in self.marks or entry.get("stopped")):
                    needed |= set(live_edits(journal.entries[: i + 1]))
        return needed

    def _resume(self, journal: Journal) -> ResumeState:
        """Where the journal ends; further back where a patch is missing or torn."""
        while (stack := self.patches.load(live_edits(journal.entries))) is None:
            journal.cut(len(journal.entries) - 1)
        journal.sweep()
        entries = journal.entries
        self.patches.keep(self._needed(journal))
        self.numbers |= {p.id: t for t, p in zip(live_edits(entries), stack, strict=True)}
        return ResumeState(
            entries[-1]["edits"] if entries else 0,
            () if self.single else tuple(stack),
            {int(i): why for e in entries for i, why in e.get("undone", {}).items()},
            any(e.get("stopped") for e in entries),
            {e["part"] for e in entries},
        )

    # -- the end -----------------------------------------------------------------------------------------------

    def _stacks(self, journal: Journal) -> list[Stack]:
        """What size and speed are taken of: the final stack, or the first single edits."""
        numbers = live_edits(journal.entries)
        loaded = self.patches.load(numbers[:_SAMPLE] if self.single else numbers)
        if loaded is None:
            raise StorageError(f"{self.patches.folder}: a patch was damaged since it was written; run again, it will be made anew")
        return [(p,) for p in loaded] if self.single else [tuple(loaded)]

    def _finish(self, journal: Journal) -> None:
        clock, stacks = Clock(), self._stacks(journal)
        parts = [entry["part"] for entry in journal.entries]
        records = [r for part in parts for r in journal.records(part)]
        if self.spec.score.fluency:
            records += clock.run("sampling", lambda: self._fluency(journal, stacks))
        found = summary.of_cell(self.cell, records, journal.entries, self.cases)
        document(
            self.folder / "summary.json",
            {**found, "known": base_answers.known(self.base), "left_out": dict(self.left_out), "window": self.lm.context_length},
        )
        memory = cost.peak(self.lm.device)
        found = summary.sizes(stacks, self.single)
        if self.spec.score.latency:
            prompts = [self.cases[0].request.prompt] * 4
            seconds, ratio = clock.run("timing", lambda: cost.latency(self.lm, stacks[:1], prompts, tokens=8, repeat=3))[0]
            found["latency"] = {"seconds_a_token": seconds, "against_base": ratio}
        journal.time("end", clock.spent)
        document(self.folder / "cost.json", {"seconds": journal.times(), "edits": journal.entries[-1]["edits"], **memory, **found})
        journal.add(DONE, records, edits=journal.entries[-1]["edits"])
        journal.sweep()
        if self.spec.store.patches == "drop":
            self.patches.keep(set())

    def _fluency(self, journal: Journal, stacks: list[Stack]) -> Records:
        """GE and RS after all edits; of single edits, of those whose patches are kept."""
        if self.single:
            loaded = self.patches.load(self.patches.there()) or []
            stacks = [(p,) for p in loaded]
        else:
            stacks = stacks * journal.entries[-1]["edits"]
        return generation.score(self.lm, self.cases[: len(stacks)], stacks, self.cell.method.label, self.source)


def live_edits(entries: Sequence[dict[str, Any]]) -> list[int]:
    """T of the patches that are on after these parts, oldest first (all there are, of single edits)."""
    on: list[int] = []
    for entry in entries:
        on = [t for t in on if t not in set(entry.get("gone", ()))] + list(entry.get("made", ()))
    return on
