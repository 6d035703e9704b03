"""`errata analyse gates`: the weights against a plain computation, each sign on a case made for it, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import lm
from runs import done, spec_of
from tiny import EDITS, QUICK, leftovers

import errata
from errata.analyse import gate_training, gates
from errata.cli import main
from errata.config import build
from errata.core.bank import Stack
from errata.core.patch import Patch
from errata.errors import ConfigError, InputError, PatchError
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.reft import ReFT
from errata.request import Case, EditRequest, Probe
from errata.run import grid
from errata.score.evaluator import AnswerCache

OTHERS = (("The capital of Japan is", "Tokyo"), ("The language of France is", "French"))
OWN = {"rank": 4, "lr": 0.02, "batched_lr": 0.02, "end": ".", "layers": [1]}
SETTINGS = {**BaFT.PRESETS["published"], **OWN}


def case(prompt: str, target: str, subject: str) -> Case:
    request = EditRequest(prompt, target, subject, unrelated=(("In Tokyo people speak", "Japanese"),))
    local = tuple(Probe("unrelated", p, a) for p, a in OTHERS if p != prompt)
    return Case(request, (Probe("rewrite", prompt, target), Probe("rephrase", f"Today {prompt}", target), *local))


CASES = [case(*edit) for edit in EDITS]


def inputs(stack: Stack) -> list[gates.GateInputs]:
    return [gates.of_case(c, stack) for c in CASES]


def made(**changes: torch.Tensor) -> Stack:
    """A patch whose op at block 1 has these tensors."""
    patch = build(BaFT, {**SETTINGS, "gate": "rmsnorm"}).edit(lm("llama"), [CASES[0].request])
    op = patch.ops[0]
    return (dataclasses.replace(patch, ops=(dataclasses.replace(op, tensors={**op.tensors, **changes}),)),)


@pytest.fixture(scope="module")
def patch() -> Patch:
    return build(BaFT, SETTINGS).edit(lm("llama"), [c.request for c in CASES])


def by_sign(found: list[gates.GateWeights]) -> dict[str, dict]:
    return {row["sign"]: row for row in gates.signs(found, {})}


def test_weights_are_those_of_the_definition(patch: Patch) -> None:
    """σ((v_k + v_0)·h) from the block's input to the op, over the last prompt tokens and the answer, padding left out."""
    base = lm("llama")
    found = gates.read(base, inputs((patch,)))
    op = patch.ops[0]
    row = base.encode([CASES[1].request.prompt], [CASES[1].request.target])[0]
    seen = []
    handle = base.blocks[1].register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).detach()))
    base.logits(base.batch([row]), [()])
    handle.remove()
    h = seen[0][0, max(0, row.prompt_length - 3) :].double()
    v = op.tensors["V"].double()
    want = torch.sigmoid(h @ (v[:-1] + v[-1:]).T).mean(0)
    (own,) = [f for f in found if f.case == CASES[1].id and f.kind == "edited"]
    assert own.block == 1 and own.inputs == 1 and own.stack == patch.id
    np.testing.assert_allclose(own.w, want.numpy(), atol=1e-5)
    assert {f.kind for f in found} == {"edited", "rephrased", "unrelated"}


def test_rows_under_other_patches_are_read_as_alone() -> None:
    """Each case under its own patch, in one batch, with patches of another rank among them."""
    base = lm("llama")
    ranks = (4, 2, 4)
    stacks = [(build(BaFT, {**SETTINGS, "rank": r}).edit(base, [c.request]),) for r, c in zip(ranks, CASES, strict=True)]
    together = gates.read(base, [gates.of_case(c, s) for c, s in zip(CASES, stacks, strict=True)])
    for c, s in zip(CASES, stacks, strict=True):
        for mine in gates.read(base, [gates.of_case(c, s)]):
            (other,) = [f for f in together if (f.case, f.kind) == (mine.case, mine.kind)]
            np.testing.assert_allclose(other.w, mine.w, atol=1e-5)


def test_collapse_fires_on_a_constant_gate_and_not_on_one_trained_to_tell_apart() -> None:
    base = lm("llama")
    shut = by_sign(gates.read(base, inputs(made(V=torch.zeros(4, base.width)))))["collapse"]
    assert shut["fires"] is True and shut["value"] == pytest.approx(0, abs=1e-12) and "ReFT" in shut["says"]
    apart = {**SETTINGS, "gate": "rmsnorm", "rescale": "margin", "beta": 0.6, "gamma": 0.5, "batched_steps": 150, "stop_on": "total"}
    trained = build(BaFT, apart).edit(base, [c.request for c in CASES])
    row = by_sign(gates.read(base, inputs((trained,))))["collapse"]
    assert row["fires"] is False and row["value"] > 0.02


def test_a_collapsed_gate_is_a_reft() -> None:
    """What the sign says: w constant is ReFT with A' = R + diag(w)(A − R), b' = w ∘ b."""
    base = lm("llama")
    stack = made(V=torch.zeros(4, base.width))
    t = stack[0].ops[0].tensors
    mixed = {"R": t["R"], "A": t["R"] + 0.5 * (t["A"] - t["R"]), "b": 0.5 * t["b"]}
    plain = build(ReFT, OWN).edit(base, [CASES[0].request])
    other = (dataclasses.replace(plain, ops=(dataclasses.replace(plain.ops[0], tensors=mixed),)),)
    batch = base.batch(base.encode([c.request.prompt for c in CASES]))
    torch.testing.assert_close(base.logits(batch, [stack]), base.logits(batch, [other]), atol=2e-4, rtol=1e-4)


def test_imbalance_fires_when_one_basis_opens_and_not_when_all_do() -> None:
    base = lm("llama")
    seen = []
    handle = base.blocks[1].register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
    for c in CASES:
        row = base.encode([c.request.prompt], [c.request.target])
        base.logits(base.batch(row), [()])
        seen[-1] = seen[-1][max(0, row[0].prompt_length - 3) :]  # the tokens acted on
    handle.remove()
    h = torch.cat(seen)
    up = torch.linalg.pinv(h / h.square().mean(-1, keepdim=True).sqrt()) @ torch.full((len(h),), 8.0)  # a logit of 8 at each of them
    down, g = -up, torch.ones(base.width)
    one = by_sign(gates.read(base, inputs(made(V=torch.stack([up, down, down, down]), g=g))))["imbalance"]
    assert one["fires"] is True and one["value"] == 1 and one["bound"] == 1
    four = by_sign(gates.read(base, inputs(made(V=torch.stack([up] * 4), g=g))))["imbalance"]
    assert four["fires"] is False and four["value"] == 4


def locality(values: list[float]) -> list[dict]:
    """Records with this locality, a case each."""
    keep = {"gen_agree": True, "gen_match_after": True, "gen_match_before": True, "tf_before": 1.0, "tf_after": 1.0, "known": True}
    return [
        {"method": "baft", "case": f"c{i}", "kind": "unrelated", "target": "x", "tf_agree": v, **keep} for i, v in enumerate(values)
    ]  # fmt: skip


def test_falling_locality_fires_where_it_falls_and_only_there() -> None:
    high = [1.0] * 40
    assert gates.falling({1: locality(high[:1]), 10: locality(high[:10]), 40: locality([0.5] * 40)})["fires"] is True
    assert gates.falling({10: locality(high[:10]), 40: locality(high)})["fires"] is False
    assert gates.falling({20: locality(high[:20]), 40: locality([0.98] * 40)})["fires"] is False  # clear of 0, but small
    noisy = [1.0, 0.0] * 10
    assert gates.falling({20: locality(noisy), 40: locality(noisy[::-1] * 2)})["fires"] is False  # large by chance only
    for few in ({10: locality(high[:10])}, {}, {1: locality(high[:1]), 10: locality(high[:10])}):
        row = gates.falling(few)
        assert row["fires"] is None and "needs" in row["says"]


def test_tests_pair_the_kinds_of_each_case(patch: Patch) -> None:
    found = gates.tests(gates.read(lm("llama"), inputs((patch,))))
    assert [(t["a"], t["b"]) for t in found] == [("edited", "rephrased"), ("edited", "unrelated"), ("rephrased", "unrelated")]
    assert all(t["n"] == 3 and 0.25 <= t["p"] <= 1 and t["adjusted"] >= t["p"] for t in found)  # three pairs: no p below 2/8


def test_no_gate_and_two_gates_are_refused(patch: Patch) -> None:
    base = lm("llama")
    plain = build(ReFT, OWN).edit(base, [CASES[0].request])
    with pytest.raises(InputError, match="make the patch with baft"):
        gates.read(base, inputs((plain,)))
    with pytest.raises(PatchError, match="two edits of this stack act at block 1"):
        gates.read(base, inputs((patch, dataclasses.replace(made()[0]))))


def test_weights_of_each_edit_are_what_it_added() -> None:
    """The running mean after edit t is what R_bal sees; turned off, the first edit's weights differ."""
    base, editor = lm("llama"), build(BaFT, {**SETTINGS, "steps": 5, "stop": 0.0})
    grown = gate_training.run_continual(base, editor, CASES, [1, 3])
    assert sorted(grown.stacks) == [1, 3] and len(grown.weights) == 3
    state = grown.stacks[3][-1].state["weights.1"].double().numpy()
    np.testing.assert_allclose(sum(own[1] for own in grown.weights), state, atol=1e-5)
    np.testing.assert_allclose(grown.weights[0][1], grown.stacks[1][-1].state["weights.1"].numpy(), atol=1e-6)
    rows = gate_training.balance(base, editor, CASES, grown)
    assert [(r["variant"], r["t"]) for r in rows] == [(v, t) for v in ("with", "without") for t in (1, 2, 3)]
    means = state / 3
    assert rows[2]["variance"] == pytest.approx(means.var(ddof=1), rel=1e-4)
    assert rows[2]["squared_cv"] == pytest.approx(means.var(ddof=1) / means.mean() ** 2, rel=1e-4)
    with pytest.raises(ConfigError, match="nothing to balance"):
        gate_training.balance(base, dataclasses.replace(editor, gate="subspace"), CASES, grown)


def test_the_balancing_loss_balances() -> None:
    """Over bases, weights lie closer together with it than without, where training goes on long enough for it to act."""
    base, editor = lm("llama"), build(BaFT, {**SETTINGS, "rank": 6, "lr": 0.05, "steps": 60, "stop": 0.0, "locality": False})
    rows = gate_training.balance(base, editor, CASES[:1], gate_training.run_continual(base, editor, CASES[:1], [1]))
    end = {r["variant"]: r["variance"] for r in rows}
    assert end["with"] < 0.5 * end["without"]


def test_locality_curve_has_both_variants_and_their_fronts() -> None:
    rows = gate_training.locality(lm("llama"), build(BaFT, {**SETTINGS, "steps": 8}), CASES, AnswerCache(), rates=(0.5, 1.0))
    assert [(r["variant"], r["lr"]) for r in rows] == [("with", 0.01), ("with", 0.02), ("without", 0.01), ("without", 0.02)]
    assert any(r["front"] for r in rows if r["variant"] == "with") and any(r["front_of_all"] for r in rows)
    bare = [dataclasses.replace(c, request=dataclasses.replace(c.request, unrelated=())) for c in CASES]
    with pytest.raises(ConfigError, match="no case brings unrelated texts"):
        gate_training.locality(lm("llama"), build(BaFT, SETTINGS), bare, AnswerCache())


# -- the command -----------------------------------------------------------------------------------------------


def test_command_on_a_model(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "g"
    argv = ["analyse", "gates", tiny, "--n", "2", "--set", "steps=2", "--set", "rank=2", "--compare", "balance,locality"]
    assert main([*argv, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Failure signs" in said and "needs a continual run" in said and "locality term" in said
    drawn = [f"gates-{name}.{end}" for name in ("balance", "locality", "weights") for end in ("png", "svg")]
    assert leftovers(out) == sorted([*drawn, "gates.json"])
    document = json.loads((out / "gates.json").read_text())
    assert (
        document["cases"] == 2 and len(document["locality"]) == 10 and {s["sign"] for s in document["signs"]} >= {"collapse", "imbalance"}
    )
    assert main([*argv[:5], "--out", str(out)]) == 6
    assert main(["analyse", "gates", tiny, "--n", "1", "--set", "steps=1", "--out", str(out), "--force"]) == 0  # it knows its own folder
    assert leftovers(out) == ["gates-weights.png", "gates-weights.svg", "gates.json"]


@pytest.mark.parametrize("mode", ["single", "continual"])
def test_command_on_patches(mode: str, tiny: str, requests: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e"
    assert main(["edit", tiny, "--requests", requests, "--mode", mode, *QUICK, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["analyse", "gates", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cases"] == 3 and "3 of 3 edits are in no case" in document["notes"][0]
    fires = {s["sign"]: s["fires"] for s in document["signs"]}
    assert fires["collapse"] is (None if mode == "single" else False)  # a patch and one input: nothing to vary over
    assert main(["analyse", "gates", str(out), "--compare", "balance"]) == 2
    assert "no BaFT patch of cases" in capsys.readouterr().err


RUN = """
methods:
  - {name: baft, set: {rank: 2, lr: 0.02, steps: 4, layers: [3], opens: answer, resume: true}}
  - {name: ft-m, set: {layers: [3], steps: 2}}
benchmark: {name: "own:Tiny", n: 12}
scenario: [{kind: continual, marks: [10, 12]}, single]
score: {latency: false, right_after: false}
threads: 1
"""


def test_command_on_a_run(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cell that is asked for, on the very patches and cases of the run; by its folder too."""
    spec = spec_of(tmp_path, tiny, text=RUN)
    root = done(tmp_path / "r", spec)
    capsys.readouterr()
    assert main(["analyse", "gates", str(root)]) == 2
    said = capsys.readouterr().err
    assert "2 cells have gates, name one by --cell" in said and "ft_m" not in said
    growing, single = (c for c in grid.cells(spec) if c.method.name == "baft")
    assert main(["analyse", "gates", str(root), "--cell", growing.id, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cases"] == 12 and document["cell"] == growing.id and document["notes"] == []
    assert next(s for s in document["signs"] if s["sign"] == "locality")["says"].startswith("T = 10 to 12: ")
    patch = Patch.load(root / "cells" / growing.id / "patches" / "0000012")
    loaded = errata.load(tiny)
    assert document["summary"] == gates.summary(gates.read(loaded, [gates.of_case(c, (patch,)) for c in growing.cases()]))
    assert main(["analyse", "gates", str(root / "cells" / single.id), "--json"]) == 0  # a cell by itself
    document = json.loads(capsys.readouterr().out)
    assert document["cases"] == 12 and next(s for s in document["signs"] if s["sign"] == "locality")["fires"] is None
    (root / "cells" / single.id / "records.jsonl").unlink()
    assert main(["analyse", "gates", str(root), "--cell", single.id]) == 2
    assert "is not done yet; finish it with `errata run`" in capsys.readouterr().err
    dropped = done(tmp_path / "d", spec_of(tmp_path, tiny, "store.patches=drop", "scenario=single", "benchmark.n=2", text=RUN))
    assert main(["analyse", "gates", str(dropped), "--json"]) == 0
    assert "kept" not in (document := json.loads(capsys.readouterr().out)) and "dropped its patches" in document["notes"][0]


def test_command_on_scored_runs_and_bad_folders(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    (out).mkdir()
    (out / "summary.json").write_text(json.dumps({"model": tiny}))
    records = [{**r, "edits": t} for t, v in ((10, 1.0), (40, 0.5)) for r in locality([v] * t)]
    (out / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["analyse", "gates", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(s["sign"], s["fires"]) for s in document["signs"]] == [("locality", True)] and document["summary"] == []
    (out / "records.jsonl").write_text("[1]\n")
    assert main(["analyse", "gates", str(out)]) == 2
    assert "records.jsonl:1: not a record" in capsys.readouterr().err
    (out / "summary.json").write_text("{}")
    assert main(["analyse", "gates", str(out)]) == 2
    assert "give it with --model" in capsys.readouterr().err
    assert main(["analyse", "gates", tiny, "--compare", "banana"]) == 2
    assert "there are balance and locality" in capsys.readouterr().err
