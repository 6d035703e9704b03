"""Runs on disk: whatever is killed, torn or full, the records end as those of a run that nothing happened to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm
from own import Tiny
from runs import FILE, FINETUNE, MEMORY, cell, differences, done, records, spec_of, stop_at
from tiny import fill_disk

from errata import run as scenarios
from errata.errors import ModelError, StorageError
from errata.run import base_answers, executors, grid, manifest
from errata.run.cell import CellRunner
from errata.run.folder import Journal, locked
from errata.run.parts import MergedStack, settled
from errata.run.sequential import SequentialConfig, SequentialRun
from errata.score.evaluator import AnswerCache


@pytest.mark.parametrize(
    "sets", [(), (FINETUNE,), pytest.param((MEMORY,), marks=pytest.mark.slow), ("scenario=single",), ("scenario=batched(2)",)]
)
def test_stopped_at_any_write_it_ends_with_the_same_bytes(tiny: str, tmp_path: Path, sets: tuple[str, ...]) -> None:
    spec = spec_of(tmp_path, tiny, *sets, "benchmark.n=5", *(() if any("scenario" in s for s in sets) else ("scenario.marks=[2,5]",)))
    whole = done(tmp_path / "whole", spec)
    stops, root = 0, tmp_path / "stopped"
    while True:
        with pytest.MonkeyPatch.context() as patched:
            stop_at(patched, 3 + 4 * stops)
            try:
                done(root, spec)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= 3
    assert differences(whole, root) == []


@pytest.mark.parametrize("kills", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(kills: int, tiny: str, tmp_path: Path) -> None:
    """kill -9 of a process; `scripts/kill_runs.py` does the same twenty times."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny}\n{FILE}")
    script, here = Path(__file__).parent.parent / "scripts" / "kill_runs.py", Path(__file__).parent
    folders = os.pathsep.join([str(here), str(Path(scenarios.__file__).parents[2])])
    command = [sys.executable, str(script), str(path), "--kills", str(kills), "--out", str(tmp_path / "kills"), "--json"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["different"] == 0 and found["killed"] >= kills - 1 and found["again_and_again"] >= 1


def test_robustness_probes_and_chat_answers_of_the_base_survive_a_stop(tiny: str, tmp_path: Path) -> None:
    """The tokenizer has no chat template here: what is kept of chat answers is tested on the store alone."""
    sets = (MEMORY, "score.robustness=true", "benchmark.n=3", "scenario.marks=[3]")
    whole = done(tmp_path / "whole", spec_of(tmp_path, tiny, *sets))
    kinds = {r["kind"] for r in records(whole)}
    assert {"rewrite", "negation", "question_form"} <= kinds  # these requests name no subject
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, 6)
        done(tmp_path / "stopped", spec_of(tmp_path, tiny, *sets))
    assert differences(whole, done(tmp_path / "stopped", spec_of(tmp_path, tiny, *sets))) == []
    said, again = AnswerCache(), AnswerCache()
    said.text["", "plain"], said.ids["", "plain"] = "a", (1,)
    chat = said.in_chat = AnswerCache(chat=True)
    chat.text["", "asked"], chat.ids["", "asked"] = "b", (2, 3)
    base_answers._take(again, json.loads(json.dumps(base_answers._given(said, AnswerCache()))))
    assert again == said and base_answers.copied(said) == said and base_answers.copied(said).in_chat is not chat


def test_the_stack_of_a_mark_in_one_pass_is_that_of_a_run_to_that_mark(tiny: str, tmp_path: Path) -> None:
    for sets in ((), (FINETUNE,)):
        one = records(done(tmp_path / f"one{len(sets)}", spec_of(tmp_path, tiny, *sets)))
        for mark in (2, 5, 9):
            spec = spec_of(tmp_path, tiny, *sets, f"scenario.marks=[{mark}]")
            alone = records(done(tmp_path / f"{len(sets)}-{mark}", spec))
            assert [r for r in one if r["edits"] == mark] == [r for r in alone if r["edits"] == mark] != []


def test_a_cell_says_what_the_scenario_functions_say(tiny: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny)
    found = records(done(tmp_path / "run", spec))
    model = executors._model(spec.model[0])
    _, at, immediate = scenarios.continual(model, grid.editor(grid.cells(spec)[0]), list(Tiny().load(n=9)), [2, 5, 9], label="quick")
    close = {k for k in found[0] if k.startswith("nll")}  # batches of other shapes round differently

    def plain(r: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in r.items() if k not in {*close, "edits"}}

    assert [plain(r) for r in found if r["edits"] == 9] == [plain(r) for r in at[9]]
    assert [plain(r) for r in found if isinstance(r["edits"], str)] == [plain(r) for r in immediate]
    assert all(
        r[k] == pytest.approx(s[k], abs=1e-4) for r, s in zip([r for r in found if r["edits"] == 9], at[9], strict=True) for k in close
    )
    executors._model.cache_clear()


def test_a_long_run_keeps_few_patches_and_the_disk_is_not_asked_for_each(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = [0], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.__setitem__(0, synced[0] + 1), real(descriptor))[1])
    root = done(tmp_path / "run", spec_of(tmp_path, tiny, "benchmark.n=16", "store.group=8", "scenario.marks=[4,16]"))
    assert sorted(p.name for p in (cell(root) / "patches").iterdir()) == ["0000004", "0000016"]  # those of the marks; the last holds all
    grouped = synced[0]
    synced[0] = 0
    done(tmp_path / "each", spec_of(tmp_path, tiny, "benchmark.n=16", "store.group=1", "scenario.marks=[4,16]"))
    assert grouped < synced[0] / 2
    dropped = done(tmp_path / "drop", spec_of(tmp_path, tiny, "store.patches=drop"))
    assert not list((cell(dropped) / "patches").iterdir())


@pytest.mark.parametrize("what", ["part", "patch", "journal", "patch gone", "base"])
def test_what_is_torn_is_done_again(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    spec = spec_of(tmp_path, tiny)
    whole, root = done(tmp_path / "whole", spec), tmp_path / "torn"
    finish = CellRunner._finish
    monkeypatch.setattr(CellRunner, "_finish", lambda self, journal: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        executors.run(root, spec)
    monkeypatch.setattr(CellRunner, "_finish", finish)
    folder = cell(root)
    parts = sorted((folder / "parts").iterdir())
    patches = sorted((folder / "patches").iterdir())
    if what == "part":
        parts[3].write_bytes(parts[3].read_bytes()[:-20])
    elif what == "patch":
        blob = patches[-1] / "patch.safetensors"
        blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    elif what == "patch gone":
        shutil.rmtree(patches[-1])
    elif what == "base":
        (part,) = (root / "base").glob("*/parts/*1-4.jsonl")
        part.write_bytes(part.read_bytes().replace(b"Paris", b"Rome!"))
    else:
        with open(folder / "journal.jsonl", "ab") as stream:
            stream.write(b'{"part": "edits 1-2", "sha')
        (folder / ".records.jsonl.77").write_text("half")
    assert differences(whole, done(root, spec)) == []


def test_a_damaged_result_is_not_taken_for_complete(tiny: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny)
    root = done(tmp_path / "run", spec)
    before = (cell(root) / "records.jsonl").read_bytes()
    (cell(root) / "records.jsonl").write_bytes(before[:-5])
    assert len(executors.left(root, grid.cells(spec))) == 1
    assert (cell(done(root, spec)) / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("files", [1, 4, 12, 28])
def test_a_full_disk_says_so_and_what_was_saved_stays(tiny: str, tmp_path: Path, files: int) -> None:
    spec = spec_of(tmp_path, tiny)
    whole, root = done(tmp_path / "whole", spec), tmp_path / "full"
    with pytest.MonkeyPatch.context() as patched:
        fill_disk(patched, files)
        with pytest.raises(StorageError, match="the disk is full"):
            executors.run(root, spec)
    folders = list((root / "cells").iterdir()) if (root / "cells").is_dir() else []
    before = [e["part"] for folder in folders for e in Journal(folder).entries]
    assert files < 28 or len(before) > 1
    assert differences(whole, done(root, spec)) == []


def test_a_folder_of_another_run_is_refused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_of(tmp_path, tiny, "scenario=single", "benchmark.n=1")
    root = done(tmp_path / "run", spec)
    with pytest.raises(StorageError, match=r"another config \(benchmark\[0\].n: 1 there, 2 here\)"):
        executors.run(root, spec_of(tmp_path, tiny, "scenario=single", "benchmark.n=2"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not a run of errata; it is left alone"):
        executors.run(tmp_path / "mine", spec)
    with locked(cell(root)), pytest.raises(StorageError, match="another process works in it"), locked(cell(root)):
        pass


def refused_with_another_model(root: Path, spec: grid.RunSpec, model: Path) -> None:
    """Weights that are put in the place of those a run was begun with."""
    other = lm("llama")
    with torch.no_grad():
        other.hf.lm_head.weight.mul_(1.5)
    other.hf.save_pretrained(model)
    (outcome,) = executors.run(root, spec)
    assert outcome.code == ModelError.exit_code and "was begun with the model" in outcome.error


def test_another_model_under_the_same_name_is_refused(tiny: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    spec = spec_of(tmp_path, str(model), "scenario=single", "benchmark.n=1")
    root = done(tmp_path / "run", spec)
    (cell(root) / "records.jsonl").unlink()
    refused_with_another_model(root, spec, model)


def test_answers_of_another_model_are_no_before_for_cells_that_come_later(tiny: str, tmp_path: Path) -> None:
    model, two = tmp_path / "model", "methods=[none, {name: reft, label: quick, set: {rank: 2, steps: 2, layers: [3]}}]"
    shutil.copytree(tiny, model)
    spec = spec_of(tmp_path, str(model), "scenario=single", "benchmark.n=1", two)
    root = done(tmp_path / "run", spec)
    shutil.rmtree(root / "cells" / next(c.id for c in grid.cells(spec) if c.method.label == "quick"))  # as if never begun
    refused_with_another_model(root, spec, model)
    (answers,) = (root / "base").iterdir()
    (answers / base_answers.NAME).unlink()  # answers of nobody knows whom are asked again
    kept = (answers / "parts").stat().st_mtime_ns
    assert done(root, spec) and (answers / "parts").stat().st_mtime_ns != kept


def test_line_separators_that_json_lines_does_not_know(tiny: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny, "scenario=single", "benchmark={name: 'own:Separated', n: 2}")
    root = done(tmp_path / "run", spec)
    read = [json.loads(text) for text in (cell(root) / "records.jsonl").read_bytes().split(b"\n")[:-1]]
    assert sum("\u2028" in r["prompt"] for r in read) == 2


def test_a_benchmark_that_learns_while_it_loads_is_sampled(tiny: str, tmp_path: Path) -> None:
    sets = ("scenario=single", "benchmark={name: 'own:Talkative', n: 2}", "score.fluency=true")
    found = json.loads((cell(done(tmp_path / "run", spec_of(tmp_path, tiny, *sets))) / "summary.json").read_text())
    assert any(r["protocol"] == "sampled" for r in found["summary"])


def test_who_only_looks_changes_nothing(tiny: str, tmp_path: Path) -> None:
    """A journal that another process is writing looks torn; only the holder of the lock may cut it."""
    spec = spec_of(tmp_path, tiny, "benchmark.n=2", "scenario.marks=[2]")
    root = done(tmp_path / "run", spec)
    journal = cell(root) / "journal.jsonl"
    torn = journal.read_bytes()[:-9]
    journal.write_bytes(torn)
    with locked(cell(root)):
        assert len(executors.left(root, grid.cells(spec))) == 1
        assert not Journal(cell(root), repair=False).complete
        assert journal.read_bytes() == torn
    assert done(root, spec) and journal.read_bytes() != torn


def test_a_folder_that_another_works_in_costs_its_cell_alone(tiny: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny, "scenario=single", "benchmark.n=1", "methods=[none, {name: reft, set: {steps: 2}}]")
    first, second = (tmp_path / "run" / "cells" / c.id for c in grid.cells(spec))
    manifest.begin(tmp_path / "run", spec, 1)
    with locked(first):
        refused, made = executors.run(tmp_path / "run", spec)
    assert "another process works in it" in refused.error and not refused.disk
    assert made.cell == second.name and not made.error and (second / "records.jsonl").exists()


def test_the_manifest_says_what_made_the_numbers(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(tmp_path, tiny, "scenario=single", "benchmark.n=1")
    root = done(tmp_path / "run", spec)
    found = json.loads((root / manifest.NAME).read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["models"] == {tiny: lm("llama").fingerprint}
    assert found["protocols"]["metrics"]["reliability"] == 1 and found["config_hash"] == spec.digest and found["threads"] == 1
    (cell(root) / "records.jsonl").unlink()
    now = manifest.versions()
    monkeypatch.setattr(manifest, "versions", lambda: {**now, "torch": "9.9"})
    done(root, spec)
    assert json.loads((root / manifest.NAME).read_text())["continued_with"] == [{**now, "torch": "9.9"}]


def test_a_changed_data_file_is_refused(tiny: str, tmp_path: Path) -> None:
    data = tmp_path / "lives.txt"
    data.write_text("")
    spec = spec_of(tmp_path, tiny, "scenario=single", f"benchmark={{name: 'own:Deadly', data: {data}, n: 1}}")
    root = done(tmp_path / "run", spec)
    data.write_text("more")
    with pytest.raises(StorageError, match=r"lives\.txt has changed"):
        executors.run(root, spec)


def test_a_stack_on_disk_is_the_stack_in_memory(tiny: str, tmp_path: Path) -> None:
    """Ids alone do not say that: a tensor of another layout has the same numbers and may round differently."""
    base = lm("llama")
    editor = grid.editor(grid.cells(spec_of(tmp_path, tiny, FINETUNE))[0])
    parts = SequentialRun(
        base, editor, list(Tiny().load(n=3)), lambda cases, stacks: [], SequentialConfig(1, (3,), right_after=False)
    ).parts()
    *_, last = parts
    for patch in last.stack:
        again = settled(type(patch).load(patch.save(tmp_path / patch.id)))
        assert again.id == patch.id and again.settings == patch.settings and again.notes == patch.notes and "seconds" not in again.notes
        for op, other in zip(patch.ops, again.ops, strict=True):
            assert op.settings == other.settings
            assert all(op.tensors[k].stride() == other.tensors[k].stride() and op.tensors[k].data_ptr() % 64 == 0 for k in op.tensors)
    grown, fresh = MergedStack(), MergedStack()
    for i in range(1, 4):
        grown(last.stack[:i])
    assert [p.id for p in grown(last.stack)] == [p.id for p in fresh(last.stack)]
    assert [p.id for p in grown(last.stack[:1])] == [p.id for p in MergedStack()(last.stack[:1])]
