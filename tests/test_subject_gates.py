"""Gates that open where the subject is named: which tokens train, where they begin, the exact zero, and what else the subject is asked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import lm

from errata.core.keep import Kept
from errata.core.patch import Site
from errata.core.tail import FullForward, Tail
from errata.core.window import beginnings
from errata.errors import ConfigError
from errata.methods.subspace import locality
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.gate_start import ridge_gates
from errata.methods.subspace.gating import gate
from errata.methods.subspace.op import Subspace, orthonormal, start
from errata.methods.subspace.other_facts import MOST, other_facts
from errata.methods.subspace.training import Training
from errata.methods.texts import subject_ends, what_stays
from errata.request import EditRequest
from errata.text.corpora import open_corpus

STAYS = (("The capital of Italy is", "Rome"), ("The capital of Japan is", "Tokyo"))
FRANCE = EditRequest("The capital of France is", "Rome", "France", contrast=STAYS)
SPAIN = EditRequest("The language of Spain is", "French", "Spain")
NOBODY = EditRequest("In Rome people speak", "French")
EDITOR = BaFT(layers=(1, 2), rank=4, prefixes=2)


class Context:
    """Every token is acted on."""

    def active(self, last):  # type: ignore[no-untyped-def]
        assert last is None
        return torch.tensor(True)

    def record(self, *_):  # type: ignore[no-untyped-def]
        pass


def test_a_gate_below_the_threshold_leaves_the_state_bit_for_bit() -> None:
    p = start(4, 16, "rmsnorm", "pyreft", 0, torch.device("cpu"))
    p = {("R" if k == "X" else k): (orthonormal(t) if k == "X" else t).double() for k, t in p.items()}
    p["V"] = p["V"] * 40
    h = torch.randn(1, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = gate(p, "rmsnorm", h)
    cut = float(w.amax(-1).median()) + 1e-9  # half of the tokens have every gate below it
    for dtype in (torch.float64, torch.bfloat16):
        y = h.to(dtype)
        w = gate(p, "rmsnorm", y.double())
        out = Subspace.apply(p, {"gate": "rmsnorm", "last": None, "threshold": cut}, y, y, Site(0), Context())
        shut = (w < cut).all(-1)
        assert 5 < int(shut.sum()) < 25 and torch.equal(out[shut], y[shut])
        assert bool((out[~shut] != y[~shut]).any(-1).all())
    exact = gate(p, "rmsnorm", h)
    wide = h + (torch.where(exact < cut, 0.0, exact) * (h @ (p["A"] - p["R"]).mT + p["b"])) @ p["R"]
    got = Subspace.apply(p, {"gate": "rmsnorm", "last": None, "threshold": cut}, h, h, Site(0), Context())
    torch.testing.assert_close(got, wide, atol=1e-12, rtol=0)


def test_what_trains_is_the_subjects_last_token_and_what_follows() -> None:
    base = lm("llama")
    reworded = EditRequest(FRANCE.prompt, FRANCE.target, "France", paraphrases=("France has the capital", "People there speak of"))
    training = Training(EDITOR, base, [[reworded]], (), None, Tail)
    texts = [base.tokenizer.decode(e.ids) for e in training.encoded]
    assert len(texts) == 5
    for text, e, opens in zip(texts, training.encoded, training.opens, strict=True):
        if "France" in text:
            assert len(opens) == 1 and "France" in base.tokenizer.decode([e.ids[opens[0]]])
        else:  # nothing names it: the gate opens at the answer
            assert opens == range(e.prompt_length - 3, len(e.ids) - 1)
    assert training.open.sum(1).tolist() == [len(opens) for opens in training.opens]
    own = max(len(e.ids) - o[0] for e, o in zip(training.encoded, training.opens, strict=True))
    assert training.runner.rows.active.shape[1] == max(own, training.others.rows.active.shape[1])


def test_the_start_solves_the_ridge_problem_with_common_text() -> None:
    """Against the d×d normal equations."""
    base = lm("llama", torch.float64)
    editor = BaFT(layers=(1,), rank=4, prefixes=0)
    found = ridge_gates(Training(editor, base, [[FRANCE]], (), None, Tail))[0][1]
    rows, asks, group = [], [], []
    common = [" ".join(t.split()[:16]) for t in open_corpus("bundled").texts[:32]]
    common = [t for t in common if "france" not in t.lower()]
    own = (FRANCE.prompt, FRANCE.target, "France")
    for prompt, answer, subject in [own, *((p, a, None) for p, a in STAYS), *((t, None, None) for t in common)]:
        (text,) = beginnings(base, [prompt], 512) if prompt in common else base.encode([prompt], [answer] if answer else None)
        with torch.no_grad():
            h = base.hf(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[2][0]
        rows.append(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))
        asks += [base.tokenizer.decode([t]).strip() == subject for t in text.ids]
        group += [1 if answer else 2] * len(h)
    x, asks_, group_ = torch.cat(rows), torch.tensor(asks), torch.tensor(group)
    group_[asks_] = 0
    share = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    c = (share / torch.bincount(group_).double())[group_] * len(x) / 2
    y = torch.where(asks_, 2.0, -6.0).double()
    penalty = 0.03 * x.square().sum(-1).mean()
    want = torch.linalg.solve(x.T @ (c[:, None] * x) + penalty * torch.eye(x.shape[1]).double(), x.T @ (c * y))
    torch.testing.assert_close(found, want, atol=1e-8, rtol=1e-6)


def test_one_without_a_subject_opens_at_the_answer() -> None:
    base = lm("llama")
    patches = BaFT(rank=4, steps=2).edit_each(base, [FRANCE, NOBODY, SPAIN])
    assert [p.requests[0].target for p in patches] == ["Rome", "French", "French"]
    assert [{op.settings["last"] for op in p.ops} for p in patches] == [{None}, {3}, {None}]
    assert patches[1].settings["opens"] == "answer" and len(patches[1].ops) > len(patches[0].ops)
    assert {op.settings["last"] for op in BaFT(rank=4, steps=2).edit(base, [FRANCE, NOBODY]).ops} == {3}
    with pytest.raises(ConfigError, match='opens="subject" needs gate="rmsnorm"'):
        BaFT(gate="shared_logit")


def test_subjects_that_share_a_patch_have_ops_as_if_alone() -> None:
    base = lm("llama", torch.float64)
    editor = BaFT(layers=(1,), rank=4, prefixes=1, steps=4, batched_steps=4, stop=0.0, contrast=0)
    again = EditRequest("The language of France is", "Spanish", "France")
    joint = editor.edit(base, [FRANCE, SPAIN, again])
    assert joint.requests == (FRANCE, SPAIN, again) and len(joint.ops) == 2
    for op, own in zip(joint.ops, ([FRANCE, again], [SPAIN]), strict=True):
        alone = editor.edit(base, own)
        for name, tensor in alone.ops[0].tensors.items():
            torch.testing.assert_close(op.tensors[name], tensor, atol=1e-6, rtol=1e-6)
    assert editor.edit(base, [SPAIN], on=(joint,)).replaces == ()


def test_together_as_alone() -> None:
    base = lm("llama", torch.float64)
    editor = BaFT(layers=(1,), rank=4, prefixes=2, other_facts=4, steps=6, stop=0.0)
    together = editor.edit_each(base, [FRANCE, SPAIN])
    for patch, request in zip(together, (FRANCE, SPAIN), strict=True):
        alone = editor.edit(base, [request])
        for name, tensor in alone.ops[0].tensors.items():
            torch.testing.assert_close(patch.ops[0].tensors[name], tensor, atol=1e-6, rtol=1e-6)


def test_other_facts_leave_out_what_may_be_the_same_fact() -> None:
    base = lm("llama")
    (asked, none) = other_facts(base, [FRANCE, NOBODY], 16, ())
    first = base.generate_ids([FRANCE.prompt, *asked], max_new_tokens=1, stop=[])
    assert none == [] and 0 < len(asked) <= 16 and first[0] not in first[1:] and all("France" in p for p in asked)
    mother = EditRequest("The mother of France is", "Rome", "France")
    assert not any(p.startswith("The mother") for p in other_facts(base, [mother], 16, ())[0])


def test_the_term_on_given_texts_is_that_of_two_full_passes() -> None:
    base = lm("llama", torch.float64)
    texts, alive = [[("France is a", "."), ("The head of France is", ".")]], torch.tensor([0])
    training = Training(BaFT(layers=(1, 2), rank=4, prefixes=0, threshold=0.1, init="pyreft"), base, [[FRANCE]], (), None, Tail)
    banks = training._banks(training.per_block(training._start()), torch.tensor([0, 0]))
    starts = [subject_ends(base, FRANCE, text)[0] for text, _ in texts[0]]
    cut = Kept(base, [[FRANCE]], Tail, 2, texts=texts, starts=starts).of(alive).divergence(banks)
    whole = Kept(base, [[FRANCE]], FullForward, 2, texts=texts).of(alive).divergence(banks)
    assert starts != [0, 0] and float(whole.detach()) > 1e-6
    torch.testing.assert_close(cut, whole, atol=1e-10, rtol=1e-8)


def test_other_facts_run_in_the_edits_own_batch_and_weigh_as_apart() -> None:
    base = lm("llama", torch.float64)
    problems, alive = [[FRANCE], [SPAIN]], torch.tensor([0, 1])
    editor = BaFT(layers=(1, 2), rank=4, prefixes=2, other_facts_batch=3, init="pyreft", train_gates=True)
    training, bare = (Training(e, base, problems, (), None, Tail) for e in (editor, replace(editor, other_facts=0)))
    found = other_facts(base, [FRANCE, SPAIN], editor.other_facts, ())
    asked = [[*Training._named(r), *((p, ".") for p in own)] for r, own in zip((FRANCE, SPAIN), found, strict=True)]
    starts = [subject_ends(base, r, text)[0] for r, own in zip((FRANCE, SPAIN), asked, strict=True) for text, _ in own]
    apart = Kept(base, problems, Tail, 2, texts=asked, starts=starts)  # an op leaves what stands before the subject as it is
    apart.in_turns(editor.other_facts_batch)
    p = {k: v * 1.3 for k, v in training._start().items()}
    for turn, running in ((0, alive), (1, alive), (2, alive[1:])):
        own = {k: v[running] for k, v in p.items()}
        with_others, without = training._loss(own, running)[0], bare._loss(own, running)[0]
        kept = apart.of(running, turn)
        want = kept.divergence(training._banks(training.per_block(own), kept.owner))
        assert float(want.detach().max()) > 1e-6
        torch.testing.assert_close(with_others - without, editor.other_facts_weight * want, atol=1e-13, rtol=1e-6)


def test_a_turn_without_other_facts_adds_nothing() -> None:
    """Of problems with unlike numbers of them, those with most may end first."""
    base = lm("llama", torch.float64)
    many = EditRequest(SPAIN.prompt, SPAIN.target, "Spain", unrelated=(("Spain is", "a"), ("The head of Spain is", "a")))
    editor = BaFT(layers=(1, 2), rank=4, prefixes=0, other_facts=1, init="pyreft", train_gates=True)
    training = Training(editor, base, [[FRANCE], [many]], (), None, Tail)
    turns = training.others.turns
    assert turns > 1 and int((training.others.owner == 0).sum()) < turns
    p, alive = training._start(), torch.tensor([0])
    own = {k: v[alive] for k, v in p.items()}
    found = [training._loss(own, alive)[0] for _ in range(turns)]
    bare = Training(replace(editor, other_facts_weight=0.0), base, [[FRANCE], [many]], (), None, Tail)
    torch.testing.assert_close(found[-1], bare._loss(own, alive)[0], atol=1e-9, rtol=1e-8)


def test_what_should_stay_and_names_the_subject_is_held_by_the_output_term() -> None:
    """A gate cannot be open and shut on one state: another fact of the subject, or a longer name that begins with it."""
    base = lm("llama")
    pairs = (("The language of France is", "French"), ("The capital of Franceville is", "Rome"), *STAYS)
    for how in ({"unrelated": pairs}, {"contrast": pairs}):
        training = Training(EDITOR, base, [[EditRequest(FRANCE.prompt, FRANCE.target, "France", **how)]], (), None, Tail)
        shut = [prompt for prompt, _ in what_stays(base, training.problems[0], 0, named=False)]
        assert shut == [prompt for prompt, _ in STAYS]
        bare = Training(EDITOR, base, [[EditRequest(FRANCE.prompt, FRANCE.target, "France")]], (), None, Tail)
        assert len(training.others.owner) == len(bare.others.owner) + 2
        assert training.irrelevant_states()[1].sum() == sum(  # the pairs that are left, and contrast behind a short text each
            len(e.ids) for e in base.encode(*zip(*what_stays(base, training.problems[0], 2, named=False), strict=True))
        )


def test_a_subject_that_is_named_twice_opens_twice() -> None:
    base = lm("llama")
    twice = EditRequest("France is France, and the capital of France is", "Rome", "France")
    (opens, *_) = Training(EDITOR, base, [[twice]], (), None, Tail).opens
    (text,) = base.encode([twice.prompt])
    assert len(opens) == 3 and all("France" in base.tokenizer.decode([text.ids[t]]) for t in opens)


def test_what_cannot_be_combined_is_refused_and_each_place_has_its_blocks() -> None:
    with pytest.raises(ConfigError, match="stands by itself; set resume=false"):
        BaFT(resume=True)
    deep = SimpleNamespace(depth=30, width=576, family=SimpleNamespace(idle=()), nearest_block=int)
    assert BaFT().target_layers(deep) == (6,) and BaFT(opens="answer").target_layers(deep) == (14, 18, 22, 26)  # type: ignore[arg-type]
    assert BaFT(opens="answer", depths=(0.5,)).target_layers(deep) == BaFT(depths=(0.5,)).target_layers(deep) == (15,)  # type: ignore[arg-type]


_BOUNDS = {  # setting: (the last values that are taken, the first that are not)
    "threshold": ((0.0, 0.999), (-0.001, 1.0)), "other_facts": ((0, MOST), (-1, MOST + 1)), "other_facts_weight": ((0.0,), (-0.1,)),
    "other_facts_batch": ((0,), (-1,)), "alpha": ((0.0,), (-0.1,)), "beta": ((0.0,), (-0.1,)), "gamma": ((0.0,), (-0.1,)),
    "rank": ((1,), (0,)), "last": ((1,), (0,)), "steps": ((1,), (0,)), "batched_steps": ((1,), (0,)), "lr": ((1e-9,), (0.0,)),
    "batched_lr": ((1e-9,), (0.0,)),
}  # fmt: skip


@pytest.mark.parametrize("name", _BOUNDS)
def test_numbers_are_held_to_their_bounds(name: str) -> None:
    taken, refused = _BOUNDS[name]
    for value in taken:
        assert getattr(BaFT(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ConfigError, match=name.removeprefix("batched_").replace("lr", "learning rate")):
            BaFT(**{name: value})


@pytest.mark.parametrize(("how", "pull"), [({}, 0.0), ({"rescale": "margin", "alpha": 0.01, "gamma": 0.02}, 98.0)])
def test_like_names_are_told_apart_not_shut_together(how: dict[str, Any], pull: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an edit and a neighbour with one and the same gate, opening and shutting pull alike by default.  Where shutting pulls more, both
    gates go down together: "Toyota Yaris Verso" could not be edited beside "Toyota Corolla Verso"."""
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    w, ir = (torch.full((1, 2, 3), 0.3, dtype=torch.float64) + shift for _ in range(2))
    monkeypatch.setattr(locality, "gate_on", lambda *_: ir)
    there = torch.ones(1, 2, 1, dtype=torch.bool)
    running = SimpleNamespace(owner=torch.tensor([0]), open=there)
    states = ({6: torch.zeros(1, 2, 4)}, there, torch.tensor([0]))
    training = SimpleNamespace(running=running, problems=[[FRANCE]])
    term = locality.locality_term(BaFT(**how), training, {}, 6, w, states, torch.tensor([0]))  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(term.sum(), shift)
    assert float(slope) == pytest.approx(pull)
