"""`errata reproduce`: windows, columns, flags and misprints by hand, and each table end to end on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import lm
from test_gates import CASES, OWN, case
from test_keys import WRAPPED
from tiny import leftovers, write_piqa

from errata import published
from errata.analyse import gates, protocols, reproduce
from errata.cli import main
from errata.config import build
from errata.methods.subspace.reft import ReFT
from errata.request import Probe
from errata.score.metrics import summarise

FOURTH = case("In Paris people speak", "Italian", "Paris")
DATA = Path(__file__).parent / "data" / "benchmarks"


def job() -> protocols.Measurement:
    return protocols.Measurement(lm("llama"), lambda stage, done, total: None)


def test_windows_are_disjoint_and_begin_at_the_unedited_model() -> None:
    editor, own = build(ReFT, OWN), job()
    found = protocols.windows(own, "reft", editor, [*CASES, FOURTH], 2, part="zsre", benchmark="almanac")
    assert [[c.id for c in part] for part, _ in found] == [[CASES[0].id, CASES[1].id], [CASES[2].id, FOURTH.id]]
    first = editor.edit(own.lm, [CASES[2].request])
    assert found[1][1][-1].id == editor.edit(own.lm, [FOURTH.request], on=(first,)).id
    (row,) = own.into.rows
    assert (row["T"], row["windows"], row["n"]) == (2, 2, 4)
    figures = {c: f["value"] for c, f in row["figures"].items()}
    assert list(figures) == ["reliability", "generality", "locality", "average"]
    assert figures["average"] == pytest.approx(sum(figures[c] for c in list(figures)[:3]) / 3)
    assert {r["T"] for r in own.into.records} == {2} and len(own.into.records) == sum(len(c.probes) for c in [*CASES, FOURTH])


def test_figures_are_averaged_over_kinds_then_cases_and_the_average_has_an_interval_of_its_own() -> None:
    def probe(case: int, kind: str, right: float) -> dict[str, Any]:
        said = {
            "tf_after": right,
            "tf_before": 0.0,
            "tf_agree": right,
            "gen_match_after": right,
            "gen_match_before": 0.0,
            "gen_agree": right,
        }
        said |= {"gen_match_after": right, "gen_match_before": 0.0}
        return {"method": "m", "case": f"{case:03}", "kind": kind, "known": True, "target": "x", **said}

    found = [probe(0, "two_hop", 0.0) for _ in range(9)] + [probe(0, "alias", 1.0), probe(0, "rewrite", 1.0)]
    plain, by_kind = job(), job()
    plain.keep(found, protocols.SINGLE, method="m")
    by_kind.keep(found, protocols.SINGLE, by_kind=True, method="m")
    values = [j.into.rows[0]["figures"] for j in (plain, by_kind)]
    assert [v["portability"]["value"] for v in values] == [0.1, 0.5]  # the papers: keys of a record weigh alike, whatever they hold
    assert [v["average"]["value"] for v in values] == [0.55, 0.75]

    rng = np.random.default_rng(0)
    many = [probe(i, kind, float(rng.random() < 0.5)) for i in range(100) for kind in ("rewrite", "rephrase", "neighbour")]
    wide = job()
    wide.keep(many, protocols.SEQUENTIAL, method="m")
    figures = wide.into.rows[0]["figures"]
    width = {c: f["high"] - f["low"] for c, f in figures.items()}
    assert width["average"] < 0.75 * min(width[c] for c in ("reliability", "generality", "locality")), width
    assert {k: figures["reliability"][k] for k in ("value", "low", "high")} == {
        k: next(r for r in summarise(many) if (r["metric"], r["protocol"]) == ("reliability", "teacher_forced"))[k]
        for k in ("value", "low", "high")
    }


def test_windows_of_one_edit_are_single_edits_and_what_does_not_fit_is_said() -> None:
    editor, own = build(ReFT, {**OWN, "steps": 3}), job()
    protocols.sequential(own, {"reft": editor}, CASES, [1, 2, 10], part="zsre", benchmark="almanac")
    assert [(r["T"], r["windows"], r["n"]) for r in own.into.rows] == [(1, 3, 3), (2, 1, 2)]
    assert own.into.left_out == ["T = 10: needs 10 cases, there are 3"]
    protocols.sequential(own, {"reft": editor}, CASES, [1, 2], 2, part="zsre, batches of 2", benchmark="almanac")
    assert [(r["T"], r["batch"], r["n"]) for r in own.into.rows[2:]] == [(1, 2, 2)]
    assert own.into.left_out[-1] == "T = 2, batches of 2: needs 4 cases, there are 3"


def test_choices_alternate_and_name_the_right_answer() -> None:
    found = protocols.choices_of(CASES)
    truth = {"The capital of Japan is": "Tokyo", "The language of France is": "French"}
    assert {c.prompt for c in found} <= set(truth) and all(c.choices[c.answer] == truth[c.prompt] for c in found)
    assert len({c.prompt for c in found}) == len(found)


def test_choosing_sets_the_unedited_model_beside() -> None:
    own = job()
    editors = {"reft": build(ReFT, OWN)}
    protocols.choosing(own, editors, CASES, protocols.choices_of(CASES), part="piqa", benchmark="almanac")
    before, after = own.into.rows
    assert (before["method"], after["method"], before["T"]) == ("none", "reft", 3)
    assert before["figures"]["accuracy"]["value"] == 1.0  # what the tiny model was trained on
    assert {r["method"] for r in own.into.records} == {"none", "reft"}


def test_redundancy_counts_small_dimensions_of_the_update() -> None:
    own, editor = job(), build(ReFT, {**OWN, "rank": 6})
    protocols.redundancy(own, {"reft": editor}, CASES)
    counts = []
    for c, patch in zip(CASES, editor.edit_each(own.lm, [c.request for c in CASES]), strict=True):
        (row,), seen = own.lm.encode([c.request.prompt], [c.request.target]), []
        handle = own.lm.blocks[1].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        own.lm.logits(own.lm.batch([row]), [()])
        handle.remove()
        h, t = seen[0][max(0, row.prompt_length - 3) :], patch.ops[0].tensors
        moved = (h @ (t["A"] - t["R"]).T + t["b"]).abs().mean(0)
        counts.append([int((moved < m * moved.max()).sum()) for m in protocols.SHARES])
    want = np.array(counts).mean(0)
    assert [r["count"] for r in own.into.redundancy] == pytest.approx(want.tolist())
    assert [r["M"] for r in own.into.redundancy] == list(protocols.SHARES) and own.into.redundancy[0]["rank"] == 6


def test_updates_of_a_gated_patch_are_weighed() -> None:
    """ "update" is |w ∘ (A h + b − R h)|: with every weight a half, half of ReFT's."""
    from test_gates import made

    base = lm("llama")
    stack = made(V=torch.zeros(4, base.width))
    t = stack[0].ops[0].tensors
    plain = build(ReFT, OWN).edit(base, [CASES[0].request])
    other = replace(plain, ops=(replace(plain.ops[0], tensors={k: t[k] for k in ("A", "R", "b")}),))
    a, b = (gates.read(base, [gates.of_case(CASES[0], (p,))], None, "update") for p in (stack[0], other))
    np.testing.assert_allclose([f.w for f in a], [0.5 * f.w for f in b], rtol=1e-4, atol=1e-6)


def test_edits_get_locality_questions_of_records_that_nobody_asks() -> None:
    bare = [replace(c, request=replace(c.request, unrelated=())) for c in [*CASES, FOURTH]]
    asked = {p.prompt for c in bare for p in c.probes}
    others = [replace(FOURTH, probes=(Probe("unrelated", "The capital of Spain is", "Madrid"), *FOURTH.probes))]
    found = reproduce.with_unrelated(bare, others)
    assert all(c.request.unrelated == (("The capital of Spain is", "Madrid"),) for c in found)
    assert not asked & {p for c in found for p, _ in c.request.unrelated}
    assert reproduce.with_unrelated(CASES, others) == CASES  # what a benchmark brings stays
    assert reproduce.with_unrelated(bare, bare) == bare


def figure(value: float, half: float | None) -> dict[str, Any]:
    return {"value": value, "low": None if half is None else value - half, "high": None if half is None else value + half}


@pytest.mark.parametrize(
    ("measured", "printed", "flag"),
    [
        (figure(0.80, 0.03), 0.85, "within"),
        (figure(0.80, 0.03), 0.86, "below"),
        (figure(0.80, 0.03), 0.74, "above"),
        (figure(0.80, None), 0.82, "within"),
        (figure(0.80, None), 0.83, "below"),
    ],
)
def test_flags(measured: dict[str, Any], printed: float, flag: str) -> None:
    assert reproduce.flag(measured, printed) == flag


def test_a_misprint_is_compared_by_what_it_should_be() -> None:
    table = published.get("baft-table2")
    figures = {"reliability": figure(0.25, 0.01), "average": figure(0.23, 0.01)}
    row = {"method": "memit", "part": "zsre", "benchmark": "zsre", "T": 100, "n": 100, "figures": figures}
    found, reference, same = reproduce.compare(table, "Llama-2-7b-hf", protocols.Measured(rows=[row]))
    assert (reference, same) == ("LLaMA-2-7b", True)
    assert [(r["column"], r["published"], r["flag"]) for r in found] == [("reliability", 0.25, "within"), ("average", 0.02, "within")]
    assert found[0]["misprint"] is None and found[1]["misprint"] == "printed 0.02, the mean of its row is 0.23"


# -- the command -----------------------------------------------------------------------------------------------

QUICK = ("--set", "baft.rank=2", "--set", "baft.steps=1", "--set", "baft.batched_steps=1")
BOTH = (*QUICK, "--set", "reft.rank=2", "--set", "reft.steps=1", "--set", "reft.batched_steps=1")
SINGLE_REFT = ("--set", "reft.rank=3", "--set", "reft.steps=1")
LOCATE = {k: json.dumps(v) for k, v in WRAPPED.items()}
ROBUST = tuple(part for m in ("rome", "memit") for k, v in LOCATE.items() for part in ("--set", f"{m}.{k}={v}"))
REP = ("--set", f"rep.wrapped={json.dumps(WRAPPED)}", "--set", "rep.steps=2", "--set", "rep.pool=6", "--set", "rep.rank=2")


@pytest.mark.parametrize(
    ("name", "n", "more", "methods", "files"),
    [
        ("baft-table1", 2, BOTH, ["reft", "baft"], []),
        ("baft-table2", 10, BOTH, ["reft", "baft"], ["reproduce-marks"]),
        ("baft-table4", 2, BOTH, ["reft", "ss-w", "ba-w", "ss-w & lr", "baft"], []),
        ("baft-batched", 10, BOTH, ["reft", "baft"], []),
        ("baft-table8", 2, BOTH, ["none", "reft", "baft"], []),
        ("baft-fig1", 2, SINGLE_REFT, [], ["reproduce-redundancy"]),
        ("baft-fig2", 10, QUICK, ["baft"], ["reproduce-weights"]),
        ("rep-main", 1, (*ROBUST, *REP), ["rome", "memit", "rep on rome", "rep on memit"], []),
    ],
)
def test_each_table_end_to_end(
    name: str,
    n: int,
    more: tuple[str, ...],
    methods: list[str],
    files: list[str],
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "r"
    assert main(["reproduce", name, tiny, "--n", str(n), *more, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    table = published.get(name)
    assert table.paper in said and "Not as in the paper" in said
    records = [] if name == "baft-fig1" else ["records.jsonl"]
    assert leftovers(out) == sorted([*records, "reproduce.json", "reproduce.md", *(f"{f}.{e}" for f in files for e in ("png", "svg"))])
    document = json.loads((out / "reproduce.json").read_text())
    assert list(dict.fromkeys(r["method"] for r in document["rows"])) == methods
    if name not in ("baft-fig1",):
        assert "almanac" in said and any("almanac stands in for" in d for d in document["differences"])
        assert any(r["published"] is not None for r in document["rows"]) == (name not in ("baft-table4", "baft-table8"))  # T = 100 there
    page = (out / "reproduce.md").read_text()
    assert all(m["column"] in page and f"{m['printed']:g}" in page for m in table.misprints)


def test_the_papers_own_data(roomy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """KnowEdit's four parts, each from its file; PIQA's choices after edits."""
    given = {
        "wiki-recent": "wiki-recent.json",
        "wiki-counterfact": "wiki-counterfact.jsonl",
        "wikibio": "wikibio.json",
        "convsent": "convsent.json",
    }
    data = [part for name, path in given.items() for part in ("--data", f"{name}={DATA / path}")]
    assert main(["reproduce", "baft-table1", roomy, "--n", "1", *data, *BOTH, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    columns = {b: [r["column"] for r in document["rows"] if r["part"] == b and r["method"] == "baft"] for b in given}
    assert columns["wikibio"] == ["reliability", "locality", "average"] and columns["convsent"] == ["reliability"]
    assert all(r["part"] == r["benchmark"] and r["published"] is not None for r in document["rows"])
    assert not any("stands in" in d for d in document["differences"])
    piqa = write_piqa(tmp_path)
    assert main(["reproduce", "baft-table8", roomy, "--n", "2", "--data", f"piqa={piqa}", *BOTH, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(r["method"], r["n"], r["benchmark"]) for r in document["rows"]] == [(m, 2, "piqa") for m in ("none", "reft", "baft")]
    said = document["differences"]
    assert "cases: 2, the paper's are 100" in said, "facts edited"
    assert any(d.startswith("where the paper is silent on ReFT:") and "weight_decay=0.0" in d and "gate" not in d for d in said)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["baft-tabel2"], 2, "did you mean 'baft-table2'"),
        (["baft-table4", "--method", "rome"], 2, "leave it out"),
        (["baft-table2", "--data", "x.json"], 2, "say which benchmark it is"),
        (["baft-table2", "--data", "wikibio=x.json"], 2, "is measured on zsre"),
        (["baft-table2", "--data", "zsre=missing.json"], 2, "missing.json"),
        (["baft-table2", "--set", "wise.lr=1"], 2, "no method 'wise'"),
        (["baft-batched", "--n", "3", *BOTH], 2, "too few for any row"),
        (["baft-fig2", "--n", "3", *QUICK], 2, "too few for any row"),
    ],
)
def test_wrong_arguments_get_one_clear_line(
    argv: list[str], code: int, message: str, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", argv[0], tiny, *argv[1:]]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
