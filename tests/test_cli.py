"""The command from end to end, in this process, on a tiny trained model saved to disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import FAST, FRANCE, QUICK, leftovers

import errata
from errata.cli import main
from errata.core.patch import Patch
from errata.methods.subspace.editor import SubspaceEditor


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """stdout as exactly one JSON document; nothing on stderr."""
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


# -- edit and ask ----------------------------------------------------------------------------------------------


def test_edit_one_prompt_prints_before_and_after(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", "--subject", "France", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (row,) = [line for line in out.splitlines() if line.startswith(FRANCE)]
    assert row.split()[-4:] == ["Rome", "Paris", "Rome", "yes"]
    assert "Nothing was saved; give --out DIR" in out
    assert "\x1b" not in out and not any(line != line.rstrip() for line in out.splitlines())


def test_edit_single_saves_a_patch_a_request(tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert main(["edit", tiny, "--requests", requests, *QUICK, "--out", str(out), "--json"]) == 0
    found = document(capsys)
    assert [a["after"] for a in found["answers"]] == ["Rome", "Madrid", "French"]
    assert found["saved"] == str(out) and found["mode"] == "single"
    patches = [Patch.load(out / p["id"]) for p in found["patches"]]
    assert [p.id for p in patches] == [a["patch"] for a in found["answers"]]
    assert all(len(p.requests) == 1 for p in patches)
    assert leftovers(out) == sorted([*(p.id for p in patches), "edit.json"])
    assert json.loads((out / "edit.json").read_text()) == found
    assert leftovers(out.parent) == ["out"]


@pytest.mark.parametrize("method", ["baft", "reft"])
def test_edit_continual_keeps_the_final_live_stack(
    method: str, tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["edit", tiny, "--requests", requests, "--method", method, "--mode", "continual", *QUICK, "--out", str(out), "--json"]
    assert main(argv) == 0
    (kept,) = document(capsys)["patches"]
    patch = Patch.load(out / kept["id"])
    assert len(patch.requests) == 3 and len(patch.replaces) == 2


def test_edit_batched_makes_joint_patches(tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []
    argv = ["edit", tiny, "--requests", requests, "--mode", "batched", "--batch-size", "2", *FAST, "--out", str(tmp_path / "o"), "--json"]
    with pytest.MonkeyPatch.context() as patching:
        edit = SubspaceEditor.edit

        def counted(self: SubspaceEditor, lm: object, wanted: list, **how: object) -> Patch:
            calls.append(len(wanted))
            return edit(self, lm, wanted, **how)

        patching.setattr(SubspaceEditor, "edit", counted)
        assert main(argv) == 0
    found = document(capsys)
    assert calls == [2, 1]
    assert {a["patch"] for a in found["answers"]} == {found["patches"][-1]["id"]}


def test_ask_shows_both_sides(tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["edit", tiny, "--requests", requests, *QUICK, "--out", str(out)])
    capsys.readouterr()
    ids = [p["id"] for p in json.loads((out / "edit.json").read_text())["patches"]]
    assert main(["ask", tiny, FRANCE, "The capital of Japan is", "--patch", str(out / ids[0]), "--json"]) == 0
    found = document(capsys)
    assert found["patches"] == ids[:1]
    assert [(a["base"], a["patched"]) for a in found["answers"]] == [("Paris", "Rome"), ("Tokyo", "Tokyo")]
    assert main(["ask", tiny, FRANCE, "--patch", str(out), "--json"]) == 0  # a result of `edit`: all its patches, in order
    assert document(capsys)["patches"] == ids
    assert main(["ask", tiny, FRANCE, "--patch", *(str(out / i) for i in ids[:2]), "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["prompt", "base", "patched"]
    assert main(["ask", tiny, FRANCE, "--json"]) == 0
    assert document(capsys)["answers"] == [{"prompt": FRANCE, "base": "Paris", "patched": None}]


def test_config_file_and_set(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("rank: 3\nsteps: 2\nlayers: [1, 2]\n")
    argv = ["edit", tiny, "--prompt", FRANCE, "--target", "Rome", "--config", str(config), "--set", "steps=1", "--set", "lr=1e-3", "--json"]
    assert main(argv) == 0
    settings = document(capsys)["patches"][0]["settings"]
    assert (settings["rank"], settings["steps"], settings["layers"], settings["lr"]) == (3, 1, [1, 2], 1e-3)


# -- looking ---------------------------------------------------------------------------------------------------


def test_inspect_methods_and_patch_show(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", tiny, "--json"]) == 0
    found = document(capsys)
    assert (found["depth"], found["width"], found["family"]["name"]) == (4, 32, "llama")
    assert {"path": "mlp.down_proj", "in": 64, "out": 32, "blocks": [0, 1, 2, 3]} in found["linears"]
    assert main(["inspect", tiny]) == 0
    assert found["fingerprint"] in capsys.readouterr().out
    assert main(["methods", "--json"]) == 0
    rows = {m["name"]: m for m in document(capsys)["methods"]}
    defaults = {s["name"]: s["default"] for s in rows["baft"]["settings"]}
    assert defaults["rank"] == 12 and defaults["gate"] == "rmsnorm" and "ICLR" in rows["baft"]["paper"]
    assert main(["methods"]) == 0
    assert "batched_steps" in capsys.readouterr().out
    main(["edit", tiny, "--prompt", FRANCE, "--target", "Rome", *FAST, "--out", str(tmp_path / "o")])
    (folder,) = (tmp_path / "o").glob("*/")
    capsys.readouterr()
    assert main(["patch", "show", str(folder), "--json"]) == 0
    shown = document(capsys)
    assert shown["id"] == folder.name and shown["requests"] == [{"prompt": FRANCE, "target": "Rome"}]
    assert shown["ops"][0]["shapes"]["R"] == [2, 32]
    assert main(["patch", "show", str(folder)]) == 0
    assert "'The capital of France is' -> 'Rome'" in capsys.readouterr().out
    assert main(["patch", "show", str(tmp_path / "o"), "--json"]) == 0  # the whole result, as the README does
    assert document(capsys) == shown


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"errata {errata.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("edit", "ask", "score", "inspect", "patch", "methods", "almanac", "demo"))


def test_almanac_check_asks_the_named_model(tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.almanac import check

    asked: list[int | None] = []

    def stand_in(lm: object, facts_per_relation: int | None = None, progress: object = None) -> dict[str, object]:
        asked.append(facts_per_relation)
        return {"known": 0.5, "perplexity": float("inf")}

    monkeypatch.setattr(check, "check", stand_in)
    monkeypatch.setattr(check, "text", lambda result: f"knows {result['known']}\n")
    assert main(["almanac", "check", "--model", tiny, "--quick", "--json"]) == 0
    assert document(capsys) == {"known": 0.5, "perplexity": None}
    assert main(["almanac", "check", "--model", tiny]) == 0
    assert capsys.readouterr().out == "knows 0.5\n"
    assert asked == [20, None]


# -- score and demo --------------------------------------------------------------------------------------------


def test_score_writes_a_result(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    argv = ["score", tiny, "--method", "baft,reft", "--split", "dev", "--n", "3", *FAST, "--set", "reft.lr=0.01"]
    argv += ["--out", str(out), "--json"]
    assert main(argv) == 0
    found = document(capsys)
    assert found["settings"]["reft"]["lr"] == 0.01 and found["settings"]["baft"]["lr"] == 1e-3
    assert leftovers(out) == ["records.jsonl", "report.html", "report.md", "summary.json"]
    assert json.loads((out / "summary.json").read_text()) == found
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert {r["method"] for r in records} == {"baft", "reft"} and len({r["case"] for r in records}) == 3
    assert {(r["metric"], r["protocol"]) for r in found["summary"]} >= {
        *(("reliability", p) for p in ("generated", "teacher_forced")),
        *((name, "likelihood") for name in ("S", "ES", "PS", "NS", "EM", "PM", "NM")),
    }
    assert {d["method"] for d in found["differences"]} == {"reft"}
    html = (out / "report.html").read_text()
    assert "<h1>baft and reft on" in html and "src=" not in html and "<h2>Likelihood scores</h2>" in html
    assert "| method | reliability |" in (out / "report.md").read_text()
    again = tmp_path / "again"
    assert main([*argv[:-2], str(again)]) == 0
    text = capsys.readouterr().out
    assert "reliability" in text and "unedited model" in text and "reft" in text
    titles = ("Begins with:", "Generated:", "Contains:", "Teacher-forced:", "Likelihood:", "NS (neighbours)")
    assert [text.index(title) for title in titles] == sorted(text.index(title) for title in titles)
    assert (again / "records.jsonl").read_bytes() == (out / "records.jsonl").read_bytes()  # same inputs, same bytes


def test_edit_at_a_lower_rank_says_what_is_lost(tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["edit", tiny, "--method", "ft-m", "--requests", requests, "--rank", "2", "--set", "steps=3", "--set", "lr=0.01"]
    assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    said = re.search(r"Kept at a lower rank: ([\d.]+) % of the change's", capsys.readouterr().out)
    patches = [Patch.load(p) for p in (tmp_path / "o").iterdir() if p.is_dir()]
    assert {op.kind for p in patches for op in p.ops} == {"low_rank"} and {
        op.tensors["down"].shape[0] for p in patches for op in p.ops
    } == {2}
    shares = [p.notes["lost_share"] for p in patches]
    assert said is not None and 0 < float(said[1]) < 100 and float(said[1]) == pytest.approx(100 * sum(shares) / len(shares), abs=0.06)


def test_score_with_sampled_texts_and_free_tokens(roomy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["score", roomy, "--method", "reft", "--split", "dev", "--n", "2", *FAST, "--fluency", "--free-tokens", "--json"]
    assert main([*argv, "--out", str(tmp_path / "o")]) == 0
    found = {(r["metric"], r["protocol"]) for r in document(capsys)["summary"]}
    assert {("GE", "sampled"), ("RS", "sampled"), ("reliability", "free_tokens"), ("reliability", "generated")} <= found
    html = (tmp_path / "o" / "report.html").read_text()
    assert "GE (fluency)" in html and "Free tokens" in html


def test_edits_that_contradict_each_other_are_made_where_they_do_not_meet_and_where_it_is_said(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("".join(f'{{"prompt": "Say", "target": "{word}"}}\n' for word in ("Rome", "Madrid")))
    for more in (["--mode", "single"], ["--mode", "continual", "--allow-conflicts"]):
        assert main(["edit", tiny, "--requests", str(file), *FAST, *more, "--json"]) == 0
        assert [a["target"] for a in json.loads(capsys.readouterr().out)["answers"]] == ["Rome", "Madrid"]


def test_score_batched_and_continual(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["score", tiny, "--method", "reft", "--split", "dev", "--n", "4", *FAST]
    assert main([*common, "--mode", "batched", "--batch-size", "2", "--json"]) == 0
    assert document(capsys)["batch_size"] == 2
    assert main([*common, "--mode", "continual", "--marks", "1,3", "--out", str(tmp_path / "o"), "--json"]) == 0
    found = document(capsys)
    assert {r["T"] for r in found["retention"]} == {1, 3}
    assert {r["n_cases"] for r in found["right_after"] if r["metric"] == "reliability"} == {3}
    records = [json.loads(line) for line in (tmp_path / "o" / "records.jsonl").read_text().splitlines()]
    assert {r["edits"] for r in records} == {1, 3, "right after its own"}
    assert "**After T edits. Generated" in (tmp_path / "o" / "report.md").read_text()
    assert main([*common, "--mode", "continual"]) == 0
    assert "T = 4" in capsys.readouterr().out


def test_demo(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--model", tiny, "--facts", "almanac", "--n", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("the edited prompt") == 3 and "asked otherwise" in text and "another fact" in text
    assert "Seconds an edit" in text and "Begins with" in text and "Teacher-forced:" not in text
    assert "Teacher-forced" in (out / "report.md").read_text() and "Generated" in (out / "report.md").read_text()
    assert leftovers(out) == ["patches", "records.jsonl", "report.html", "report.md", "summary.json"]
    assert len(list((out / "patches").iterdir())) == 6
    assert {Patch.load(p).method for p in (out / "patches").iterdir()} == {"baft", "reft"}
    assert main(["demo", "--model", tiny, "--facts", "almanac", "--n", "2", "--out", str(out)]) == 6
    capsys.readouterr()
    assert main(["demo", "--model", tiny, "--facts", "almanac", "--n", "2", "--out", str(out), "--force", "--json"]) == 0
    assert all(0 < v < 10 for v in document(capsys)["seconds_an_edit"].values())
    assert len(list((out / "patches").iterdir())) == 4
    assert leftovers(tmp_path) == ["demo"]
