"""Who runs the cells: the same bytes from each, and what becomes of an error or a lost worker."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import FILE, differences, done, records, spec_of

from errata import run as scenarios
from errata.cli import main
from errata.errors import ErrataError
from errata.run import executors, grid, manifest


def test_an_error_costs_its_cell_and_the_others_go_on(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FILE.replace("methods: [", "methods: [{name: 'own:Vandal', label: bad, set: {fails: [2], rank: 2, steps: 2, layers: [3]}}, ")
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {tiny}\n{text}")
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 5
    out, err = capsys.readouterr()
    assert "1 of 2 cells failed" in err and "edit 2 went to NaN" in err and "quick" in out
    outcomes = executors.run(tmp_path / "out", grid.read(path))
    assert [o.code for o in outcomes] == [5]  # only the failed one is tried again


def test_processes_give_the_same_bytes_and_a_lost_worker_is_replaced(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(scenarios.__file__).parents[2])]))
    data = tmp_path / "lives.txt"
    data.write_text("")
    sets = ("scenario=single", f"benchmark={{name: 'own:Deadly', data: {data}, n: 2}}")
    spec = spec_of(tmp_path, tiny, *sets)
    whole = done(tmp_path / "whole", spec)
    root = tmp_path / "processes"
    manifest.begin(root, spec, 2)  # before the file loses a life, which would change its hash
    data.write_text("x")
    monkeypatch.setattr(manifest, "files", lambda spec: json.loads((root / manifest.NAME).read_text())["files"])
    done(root, spec, workers=2)
    assert data.read_text() == ""  # the first worker died
    assert differences(whole, root) == []


def test_a_worker_that_is_always_lost_costs_one_cell(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        returncode = -9

        def __init__(self, command: list[str], **how: Any) -> None:
            self.said = json.dumps({"cell": command[4], "error": "", "code": 0})
            self.returncode = 0 if "quick" in command[4] or "--base" in command else -9

        def communicate(self) -> tuple[str, None]:
            return self.said, None

        def kill(self) -> None:
            raise AssertionError("it is gone")

    text = FILE.replace("methods: [", "methods: [none, ")
    spec = spec_of(tmp_path, tiny, "scenario=single", text=text)
    cells = grid.cells(spec)
    monkeypatch.setattr(executors.subprocess, "Popen", Lost)
    outcomes = executors.processes(tmp_path, cells, lambda outcome: None, 2)
    assert {o.cell: bool(o.error) for o in outcomes} == {cells[0].id: True, cells[1].id: False}
    assert "was lost 3 times" in next(o.error for o in outcomes if o.error)


def test_ray_is_asked_for_clearly(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ErrataError, match="needs the package ray; pip install 'errata\\[ray\\]'"):
        executors.run(tmp_path / "run", spec_of(tmp_path, tiny), workers="ray")


def test_on_a_real_ray_cluster(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ray is installed (it is not among the test requirements): the same bytes, and a lost worker is replaced."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(scenarios.__file__).parents[2])]))
    data = tmp_path / "lives.txt"
    data.write_text("")
    spec = spec_of(tmp_path, tiny, f"benchmark={{name: 'own:Deadly', data: {data}, n: 4}}", "scenario.marks=[2,4]")
    whole, root = done(tmp_path / "whole", spec), tmp_path / "ray"
    manifest.begin(root, spec, 1)
    data.write_text("x")
    monkeypatch.setattr(manifest, "files", lambda spec: json.loads((root / manifest.NAME).read_text())["files"])
    done(root, spec, workers="ray")
    assert data.read_text() == "" and differences(whole, root) == []


def test_a_model_spread_by_device_map_gives_the_same_records(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain = spec_of(tmp_path, tiny, "scenario=single", "benchmark.n=2")
    spread = spec_of(tmp_path, tiny, "scenario=single", "benchmark.n=2", "model.device_map=cpu")
    assert spread.model[0].device_map == "cpu"
    assert records(done(tmp_path / "plain", plain)) == records(done(tmp_path / "spread", spread))
