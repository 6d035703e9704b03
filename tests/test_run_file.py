"""Run files: what they may say, what they mean, and what is said of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.cli import main
from errata.config import to_dict
from errata.errors import ConfigError, UnknownNameError
from errata.run import grid

SMALL = "methods: [baft, {name: reft, label: r2, set: {rank: 2}}]\nbenchmark: {name: almanac, n: 5, split: dev}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_the_grid_is_the_product(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL + "scenario: [single, 'batched(3)', {kind: continual, marks: [1, 5]}]\nseeds: [0, 7]\n")
    spec = grid.read(path)
    cells = grid.cells(spec)
    assert len({c.id for c in cells}) == len(cells) == 2 * 3 * 2
    assert [c.scenario.title for c in cells[::4]] == ["single", "batched(3)", "continual"]
    assert {c.method.label for c in cells} == {"baft", "r2"}
    assert grid.from_dict(json.loads(json.dumps(to_dict(spec)))) == spec
    assert len({c.base for c in cells}) == 2  # an order a seed; all methods and scenarios share what the base says
    editors = [grid.editor(c) for c in cells]
    assert [e.seed for e in editors[:4]] == [0, 0, 7, 7] and editors[1].rank == 2


def test_what_set_can_reach(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL + "scenario: [single, continual]\n")
    sets = ["benchmark.n=3", "methods.r2.rank=5", "methods.baft.lr=3e-4", "scenario.1.marks=[1,3]", "guard.every=2", "seeds=4"]
    spec = grid.read(path, sets)
    assert spec.benchmark[0].n == 3 and spec.methods[1].set == {"rank": 5} and spec.methods[0].set == {"lr": 3e-4}
    assert spec.scenario[1].marks == (1, 3) and spec.guard is not None and spec.guard.every == 2 and spec.seeds == (4,)
    assert grid.read(path, ["scenario=batched(2)"]).scenario == (grid.ScenarioSpec("batched", 2),)
    assert grid.read(path, ["methods.1.label=x"]).methods[1].label == "x"
    assert grid.read(path).digest != spec.digest == grid.read(path, sets).digest


def test_marks_without_being_asked_for() -> None:
    assert grid.ScenarioSpec("continual").at(25) == (1, 10, 25)
    assert grid.ScenarioSpec("batched", 10).at(25) == (25,)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: [baft]\n", "no setting 'method'; did you mean 'methods'"),
        ("methods: [bafft]\n", "no method named 'bafft'; did you mean 'baft'"),
        ("methods: [{name: baft, sett: {}}]\n", "'sett'; did you mean 'set'"),
        ("methods: [baft]\nbenchmark: {name: almanac, splitt: dev}\n", r"benchmark\[0\] has no setting 'splitt'; did you mean 'split'"),
        ("methods: [baft]\nbenchmark: allmanac\n", "no benchmark named 'allmanac'; did you mean 'almanac'"),
        ("methods: [baft]\nscenario: continuous\n", "kind must be one of single, batched, continual"),
        ("methods: [baft]\nscenario: batched\n", "give size"),
        ("methods: [baft]\nscenario: {kind: single, marks: [1]}\n", "marks have no meaning"),
        ("methods: [baft]\nscenario: {kind: continual, size: 2}\n", "size has no meaning"),
        ("methods: [baft]\nguard: {every: 0}\n", "guard.every must be positive"),
        ("methods: [baft]\nguard: {evry: 3}\n", "guard has no setting 'evry'; did you mean 'every'"),
        ("methods: [baft]\nguard: 3\n", "guard must be a mapping"),
        ("methods: [baft, {name: baft, set: {rank: 3}}]\n", "two entries have the label 'baft'"),
        ("methods: [baft]\nseeds: [1, 1]\n", "two entries have the seed '1'"),
        ("methods: [baft]\nscenario: [single, single]\n", "scenario: single stands there twice"),
        ("methods: [baft]\nbenchmark: [almanac, almanac]\n", "benchmark: almanac stands there twice"),
        ("methods: []\n", "methods is empty"),
        ("model: almanac\n", "needs the setting 'methods'"),
        ("methods: [baft]\nthreads: 0\n", "threads must be at least 1"),
        ("methods: [baft]\nstore: {group: 0}\n", "at least 1"),
        ("methods: ['nowhere:Thing']\n", "'nowhere:Thing' cannot be imported"),
        ("methods: [baft]\nscore: {judges: [{name: x, url: y}]}\n", "no setting 'url'"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises((ConfigError, UnknownNameError), match=said) as caught:
        grid.read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["benchmark.m=3"], "no setting 'm'"),
        (["methods.xx.rank=3"], "'xx' is none of baft, r2"),
        (["seeds.a.b=3"], "nothing to set|is none of"),
        (["n"], "write key=value"),
    ],
)
def test_wrong_sets(tmp_path: Path, sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        grid.read(written(tmp_path, SMALL + "seeds: [0, 1]\n"), sets)


def test_a_dry_run_prints_the_grid_and_loads_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SMALL + "model: /there/is/no/such/model\nscenario: continual\n")
    assert main(["run", str(path), "--dry-run", "--out", str(tmp_path / "out"), "--set", "benchmark.n=4"]) == 0
    out = capsys.readouterr().out
    assert "2 cells; nothing was run" in out and "1, 4" in out and not (tmp_path / "out").exists()
    assert main(["run", str(path), "--dry-run", "--json"]) == 0
    assert [c["cases"] for c in json.loads(capsys.readouterr().out)["cells"]] == [5, 5]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("scenario: {kind: continual, marks: [1, 9]}\n", "marks must rise"),
        ("scenario: {kind: batched, size: 2, marks: [3, 5]}\n", "mark 3 lies inside a batch"),
    ],
)
def test_a_dry_run_finds_what_needs_the_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, said: str) -> None:
    assert main(["run", str(written(tmp_path, SMALL + more)), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    path = written(tmp_path, SMALL)
    assert main(["run", str(path), "--dry-run", "--set", "methods.r2.rnk=3"]) == 2
    assert "methods.r2 has no setting 'rnk'; did you mean 'rank'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("score: {judges: [contain]}\n", "no judge named 'contain'"),
        ("guard: {text: no-such-text}\n", "no-such-text: no such text"),
        ("score: {fluency: true}\nbenchmark: 'own:Tiny'\n", "own:Tiny, or its file, offers no prompts to sample from"),
        ("score: {fluency: true}\nbenchmark: 'own:Mute'\n", "own:Mute, or its file, offers no prompts to sample from"),
    ],
)
def test_what_would_fail_at_the_end_is_found_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, said: str
) -> None:
    text = "methods: [reft]\nmodel: /there/is/no/such/model\n" + more
    for how in (["--dry-run"], ["--out", str(tmp_path / "out")]):
        assert main(["run", str(written(tmp_path, text)), *how]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_the_run_file_of_the_documentation_runs(model: str, roomy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "runs.md").read_text(encoding="utf-8")
    own = text.split("```yaml\n")[1].split("```")[0]
    assert "model: smollm2-135m " in own  # in bfloat16 an answer depends on what stands beside it in a batch, also the unedited model's
    there = roomy if model == "tiny" else model
    path = written(tmp_path, own.replace("model: smollm2-135m ", f"model: {{name: {there}, dtype: float32}} "))
    assert main(["run", str(path), "--dry-run"]) == 0
    assert "6 cells" in capsys.readouterr().out
    small = ["benchmark.n=2", "scenario.1.marks=[1,2]", "methods.baft.steps=2", "guard.tokens=64", "score.latency=false"]
    sets = [part for one in small for part in ("--set", one)]
    assert main(["run", str(path), "--out", str(tmp_path / "out"), *sets]) == 0
    out = capsys.readouterr().out
    assert out.count(": done (") == 6 and "Saved in" in out
    records = [json.loads(line) for p in (tmp_path / "out").glob("cells/*/records.jsonl") for line in p.read_text().splitlines()]
    assert {r["method"] for r in records} == {"none", "ft-m-5", "baft"} and all("judged" in r for r in records if r["target"])
    assert all(r["gen_after"] == r["gen_before"] for r in records if r["method"] == "none")


def test_a_run_that_is_complete_needs_no_text_and_no_key_any_more(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "held out.txt"
    text.write_text("The capital of France is Paris. " * 20)
    guard = f"guard: {{every: 1, action: warn, text: '{text}', tokens: 40}}\n"
    more = "methods: [none]\nbenchmark: {name: almanac, n: 1}\nscenario: continual\nscore: {latency: false}\n"
    command = ["run", str(written(tmp_path, f"model: {tiny}\n{more}{guard}")), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    text.unlink()
    assert main(command) == 0
    (done,) = (tmp_path / "run" / "cells").iterdir()
    (done / "records.jsonl").unlink()
    capsys.readouterr()
    assert main(command) != 0 and "held out.txt" in capsys.readouterr().err
