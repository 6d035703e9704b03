"""`errata analyse keys`: ratios against a plain computation, the bounds against scaled patches, and the command's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import lm
from tiny import EDITS

from errata import registry
from errata.analyse import keys
from errata.cli import main
from errata.config import build
from errata.core.patch import Site
from errata.core.read import read_activations
from errata.errors import InputError
from errata.methods.rep.rep import REP
from errata.request import EditRequest
from errata.text.statistics import moments

SAMPLES = Path(__file__).parent / "data" / "benchmarks"

WRAPPED = {
    "layers": [0],
    "end": ".",
    "stats_tokens": 1500,
    "prefixes": [],
    "clamp": 20.0,
    "kl": 0.0,
    "v_decay": 0.0,
    "v_lr": 0.2,
    "v_steps": 10,
}
SETTINGS = {
    "wrapped": WRAPPED, "steps": 40, "lr": 0.02, "rank": 4, "closing": 1.0, "match": 1.0, "aggregation": 0.0, "consistency": 10.0,
    "away": 64, "pool": 30, "prefixes": [[3, 2]], "surfaces": ["names", "shuffled"], "tau": 0.7,
}  # fmt: skip
REQUESTS = [EditRequest(p, t, s) for p, t, s in EDITS]


@pytest.fixture(scope="module")
def found() -> keys.KeyComparison:
    return keys.compare(lm("llama"), REQUESTS, build(REP, SETTINGS))


def test_ratios_are_those_of_the_definition(found: keys.KeyComparison) -> None:
    """Without prefixes k* is the prompt's own key: its ratio is 1; other facts' keys by C⁻¹ written out."""
    base = lm("llama")
    site = Site(0, "mlp_down")
    assert all(r["before"] == pytest.approx(1.0, abs=1e-4) for r in found.rows if r["kind"] == "prompt")
    second = moments(base, [site], "bundled", tokens=1500)[site].second_moment.double()
    inverse = torch.linalg.inv(second + 1e-9 * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64))
    rows = base.encode([r.prompt for r in REQUESTS])
    ends = [r.prompt.find(r.subject) + len(r.subject) for r in REQUESTS]
    at = [
        max(i for i, (a, b) in enumerate(base.tokenizer(r.prompt, return_offsets_mapping=True)["offset_mapping"]) if a < end and b > a)
        for r, end in zip(REQUESTS, ends, strict=True)
    ]  # fmt: skip
    k = read_activations(base, rows, [site], at=at)[site][0].double()
    own = [r for r in found.rows if r["kind"] == "another fact" and r["case"] == REQUESTS[0].id]
    want = [float(k[j] @ inverse @ k[0] / (k[0] @ inverse @ k[0])) for j in (1, 2)]
    assert [r["before"] for r in own] == pytest.approx(want, rel=0.02, abs=1e-3)


def test_the_adaptor_moves_seen_surfaces_towards_the_edit(found: keys.KeyComparison) -> None:
    seen = [r for r in found.rows if r["kind"] in ("names_seen", "shuffled_seen")]
    assert any(r["opened"] for r in seen)
    away = lambda when: sum(abs(r[when] - 1) for r in seen)  # noqa: E731
    assert away("after") < away("before")
    assert all(r["before"] == pytest.approx(r["after"], abs=1e-5) for r in found.rows if not r["opened"])  # block 0: nothing below moves


def test_bounds_are_where_the_scaled_patch_changes_the_answer() -> None:
    base = lm("llama")
    strong = {**WRAPPED, "fact_token": "last", "v_steps": 80}  # at the subject these models, which know eight sentences, cannot be edited
    patches = build(registry.get("method", "rome"), strong).edit_each(base, REQUESTS)
    found = keys.limits(base, REQUESTS, patches)
    for request, patch, row in zip(REQUESTS, patches, found, strict=True):
        token = base.encode([request.prompt], [request.target])[0].target[0]
        own = base.batch(base.encode([request.prompt]))

        def says(s: float, patch=patch, own=own) -> int:  # type: ignore[no-untyped-def]
            return int(base.logits(own, [(patch.scale(s),)])[0, -1].argmax())

        old, step = int(base.logits(own, [()])[0, -1].argmax()), 1 / keys.STEPS
        assert says(row["beta_max"]) == old and (row["beta_max"] == 1 or says(row["beta_max"] + step) != old)
        if row["beta_min"] is None:
            assert says(1.0) != token
        else:
            assert says(row["beta_min"]) == token and (row["beta_min"] == 0 or says(row["beta_min"] - step) != token)
    assert any(row["beta_min"] is not None and row["beta_max"] < 1 for row in found)


def test_summary_counts_what_holds() -> None:
    row = {"case": "a", "block": 0, "opened": True}
    rows = [{**row, "kind": "long", "before": 0.2, "after": 0.9}, {**row, "kind": "another fact", "before": -0.4, "after": 0.1}]
    found = keys.summary(keys.KeyComparison(rows, [{"case": "a", "beta_min": 0.5, "beta_max": 0.3}]))
    assert [(r["kind"], r["before holds"], r["after holds"]) for r in found] == [("long", 0.0, 1.0), ("another fact", 0.0, 1.0)]
    assert keys.summary(keys.KeyComparison(rows[:1], [{"case": "a", "beta_min": None, "beta_max": 1.0}]))[0]["after holds"] == 0.0


def test_the_command_writes_numbers_and_a_plot(tiny: str, requests: str, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    sets = [part for k, v in SETTINGS.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert main(["analyse", "keys", tiny, "--requests", requests, "--method", "rome", *sets, "--out", str(tmp_path / "k")]) == 0
    said = capsys.readouterr().out
    assert "names, seen" in said and "another fact" in said
    written = json.loads((tmp_path / "k" / "keys.json").read_text())
    assert written["facts"] == 3 and {r["kind"] for r in written["summary"]} >= {"prompt", "names_seen", "another fact"}
    assert (tmp_path / "k" / "keys.svg").read_text().count("β(k, k*)") == 1 and (tmp_path / "k" / "keys.png").stat().st_size > 5000
    assert main(["analyse", "keys", tiny, "--requests", requests, "--method", "ft-l"]) == 2
    assert "wraps is one of" in capsys.readouterr().err


def test_the_facts_may_be_those_of_any_benchmark_with_edits(tiny: str, capsys) -> None:  # type: ignore[no-untyped-def]
    sets = [part for k, v in SETTINGS.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    for benchmark in (["everyday"], ["counterfact", "--data", str(SAMPLES / "counterfact-original.json")]):
        assert main(["analyse", "keys", tiny, "--benchmark", *benchmark, "--n", "1", "--method", "rome", *sets]) == 0
        assert "of 1 edits by rome" in capsys.readouterr().out
    assert main(["analyse", "keys", tiny, "--benchmark", "known1000", "--data", str(SAMPLES / "known1000.json"), "--n", "1"]) == 2
    assert "no edits to look at" in capsys.readouterr().err


def test_a_subject_is_needed() -> None:
    with pytest.raises(InputError, match="give the key 'subject'"):
        keys.compare(lm("llama"), [EditRequest("The capital of France is", "Rome")], REP())
