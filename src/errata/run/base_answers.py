"""What the unedited model says to the cases of a grid: asked once, in parts that are put on disk, for all methods, marks and workers.

Every scoring part begins from exactly these answers, whatever was asked before it, so that its batches (and with them the last bits of a
likelihood) do not depend on where a run was stopped.  ``base.json`` beside them says which model was asked, and which cases.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.config import digest
from errata.core.chat import case_in_chat
from errata.core.model import LM
from errata.errors import ModelError, StorageError
from errata.request import Case
from errata.run import grid
from errata.run.folder import Journal, Records, document, locked, read_document
from errata.score import neighbours, robustness, windows
from errata.score.evaluator import AnswerCache, Progress, cache_base_answers
from errata.score.known import known_cases
from errata.score.teacher_forcing import TeacherForced

NAME = "base.json"
KNOWN = "known.json"


def cases_of(
    lm: LM, spec: grid.RunSpec, cell: grid.Cell, folder: Path, source: Any = None, left_out: Counter[str] | None = None
) -> list[Case]:
    """The benchmark's cases, those that the base knows where ``score.known`` asks for that (``folder``: of the base's answers, which keeps
    what was found); with ``score.robustness`` also the suite's probes, the same for all methods of the run: those that fit
    behind the longest context any of them puts in front; with ``chat`` in the chat template.
    ``source``: the opened benchmark, which may learn from what it loads.  ``left_out`` counts what the model's window does not hold."""
    left_out = Counter() if left_out is None else left_out
    found: list[Case] = _known(lm, cell, folder, source, spec.chat, left_out) if grid.only_known(spec, cell) else cell.cases(source)
    found = windows.fitting(lm, found, left_out)
    if count := neighbours.to_watch(spec.score.watch, found):
        found = neighbours.add_watch_probes(lm, found, count, together=any(s.kind != "single" for s in spec.scenario))
    if spec.score.robustness:
        editors = [grid.editor(other, lm.fingerprint) for other in grid.cells(spec) if other.model == cell.model]
        found = robustness.add_robustness_probes(lm, found, room=robustness.room_of(lm, editors))
    return [case_in_chat(lm.tokenizer, case) for case in found] if spec.chat else found


def known(folder: Path) -> dict[str, Any] | None:
    """What `errata.score.known` found, where it was asked."""
    return read_document(folder / KNOWN)["known"] if (folder / KNOWN).exists() else None


def _known(lm: LM, cell: grid.Cell, folder: Path, source: Any, chat: bool, left_out: Counter[str]) -> list[Case]:
    every = cell.cases(source, every=True)
    path = folder / KNOWN
    if not path.exists():
        with locked(folder):
            answers, unfit = AnswerCache(), Counter[str]()
            shown = (lambda case: case_in_chat(lm.tokenizer, case)) if chat else (lambda case: case)
            found = known_cases(lm, windows.editable(lm, every, unfit), cell.wanted, answers, shown=shown)
            kept = {"fingerprint": lm.fingerprint, "known": found.to_dict(), "cases": [case.id for case in found.cases]}
            document(path, {**kept, "left_out": dict(unfit), "asked": _given(answers, AnswerCache())})
    then = read_document(path)
    if then["fingerprint"] != lm.fingerprint:
        raise ModelError(f"{folder}: was begun with the model {then['fingerprint']}, which is now {lm.fingerprint}; give another --out")
    left_out.update(then.get("left_out", {}))  # a folder of before has none
    by_id = {case.id: case for case in every}
    return [by_id[name] for name in then["cases"] if name in by_id]


def _begin_with(folder: Path) -> AnswerCache:
    """What the base said when it was found out which facts it knows, or nothing."""
    answers = AnswerCache()
    if (folder / KNOWN).exists():
        _take(answers, read_document(folder / KNOWN)["asked"])
    return answers


def ask(lm: LM, cases: Sequence[Case], folder: Path, chunk: int, progress: Progress | None = None) -> AnswerCache:
    """The answers kept in ``folder``; what is not there is asked and kept.  An error where they are of another model or other cases."""
    _begun(folder, who(lm, cases))
    parts = {f"cases {i + 1}-{min(i + chunk, len(cases))}": cases[i : i + chunk] for i in range(0, len(cases), chunk)}
    journal, answers = Journal(folder), _begin_with(folder)
    if len(journal.entries) < len(parts):
        with locked(folder):
            journal.sweep()
            _ask(lm, parts, journal, _begin_with(folder), progress)
    for part in parts:  # those just asked too: what is read is what every other worker reads
        _take(answers, journal.records(part))
    return answers


def who(lm: LM, cases: Sequence[Case]) -> dict[str, str]:
    """Names the model and the cases: answers belong to both."""
    asked = [[[r.to_dict() for r in c.requests], [dataclasses.astuple(p) for p in c.probes]] for c in cases]
    return {"fingerprint": lm.fingerprint, "cases": digest(asked)}


def same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """`ModelError` or `StorageError` where a folder was begun with another model or other cases (keys as in `who`)."""
    if then.get("fingerprint") != now["fingerprint"]:
        raise ModelError(
            f"{folder}: was begun with the model {then.get('fingerprint')}, which is now {now['fingerprint']}; give another --out"
        )
    if then.get("cases") != now["cases"]:
        raise StorageError(f"{folder}: the benchmark's cases are not those it was begun with; give another --out")


def _begun(folder: Path, now: dict[str, str]) -> None:
    if not (folder / NAME).exists():
        with locked(folder):
            Journal(folder).cut(0)  # answers of nobody knows whom
            document(folder / NAME, now)
    same(folder, read_document(folder / NAME), now)


def _ask(lm: LM, parts: Mapping[str, Sequence[Case]], journal: Journal, answers: AnswerCache, progress: Progress | None) -> None:
    for part, cases in parts.items():
        if all(e["part"] != part for e in journal.entries):
            fresh = copied(answers)
            cache_base_answers(lm, cases, fresh, progress)
            journal.add(part, _given(fresh, answers))
        _take(answers, journal.records(part))


def copied(answers: AnswerCache, free_tokens: bool = False) -> AnswerCache:
    """The same answers, to add to."""
    chat = None if answers.in_chat is None else copied(answers.in_chat, free_tokens)
    kept = (dict(answers.forced), dict(answers.text), dict(answers.ids))
    return AnswerCache(*kept, free_tokens, answers.chat, chat, dict(answers.limits))


def _given(now: AnswerCache, before: AnswerCache) -> Records:
    out: Records = [
        {"prompt": key[1], "text": text, "ids": list(now.ids[key]), **({"limit": now.limits[key]} if key in now.limits else {})}
        for key, text in now.text.items()
        if key not in before.text or now.limits.get(key) != before.limits.get(key)
    ]
    out += [
        {"prompt": key[1], "target": key[2], "tokens": list(f.target), "argmax": list(f.argmax), "nll": f.nll}
        for key, f in now.forced.items()
        if key not in before.forced
    ]
    if now.in_chat is not None:
        out += [{**record, "chat": True} for record in _given(now.in_chat, before.in_chat or AnswerCache())]
    return out


def _take(answers: AnswerCache, records: Records) -> None:
    for r in records:
        into = answers
        if r.get("chat"):
            into = answers.in_chat = answers.in_chat or AnswerCache(chat=True)
        if "text" in r:
            name = "", r["prompt"]
            into.text[name], into.ids[name] = r["text"], tuple(r["ids"])
            if "limit" in r:
                into.limits[name] = r["limit"]
        else:
            into.forced["", r["prompt"], r["target"]] = _forced(r)


def _forced(r: dict[str, Any]) -> TeacherForced:
    right = tuple(a == b for a, b in zip(r["argmax"], r["tokens"], strict=True))
    return TeacherForced(tuple(r["tokens"]), tuple(r["argmax"]), right, r["nll"])
