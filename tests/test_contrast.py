"""Contrast: who is near, who trains, who is watched, and that the two never mix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import lm
from hypothesis import given
from hypothesis import strategies as st

import errata
from errata import registry
from errata.contrast import contrast, names
from errata.contrast.nearest import Nearest
from errata.core.model import LM
from errata.errors import InputError
from errata.methods.subspace.baft import BaFT
from errata.request import Case, EditRequest, Probe
from errata.run.parts import asked_by, contrasted
from errata.score import neighbours
from errata.subjects import names_in

FRANCE = EditRequest("The capital of France is", "Rome", "France")


@pytest.fixture(scope="module")
def base() -> LM:
    return lm("llama")


@pytest.fixture(scope="module")
def almanac() -> LM:
    return errata.load("almanac")


def fact() -> EditRequest:
    """One the almanac knows, without the pairs that its benchmark brings."""
    return replace(next(iter(registry.get("benchmark", "almanac")().load("dev", 1))).request, unrelated=())


def test_the_list_in_the_package_is_whole() -> None:
    found = names.bundled()
    assert len(found.kinds) > 70 and sum(map(len, found.kinds.values())) > 20_000
    assert all(own and all(name == name.strip() and name for name in own) for own in found.kinds.values())
    assert found.kinds_of("France")[0] == "countries" and found.kinds_of("the eiffel tower") == found.kinds_of("The Eiffel Tower") != ()


@given(st.text(min_size=1))
def test_a_name_is_in_one_half_however_it_is_written(name: str) -> None:
    assert names.may_train(name) == names.may_train(f"  the {name.upper()}".lower()) or name.casefold() != name.upper().lower().casefold()
    assert 0 <= names.share(name) < 1


def test_about_half_of_the_names_may_train() -> None:
    every = [name for own in names.bundled().kinds.values() for name in own]
    assert 0.48 < sum(map(names.may_train, every)) / len(every) < 0.52


def test_halves_never_mix_and_hold_no_word_of_the_request(almanac: LM) -> None:
    request = fact()
    found = contrast.find(almanac, request)
    assert found.training and found.watch and found.looked_at >= len(found.training) + len(found.watch)
    assert all(names.may_train(n.subject) for n in found.training) and not any(names.may_train(n.subject) for n in found.watch)
    for n in (*found.training, *found.watch):
        assert n.prompt == request.prompt.replace(request.subject or "", n.subject, 1)
        assert not names_in(n.subject, [request.subject or "", request.target]) and not names_in(n.answer, [request.target])


def test_the_nearest_come_first_and_their_numbers_are_the_models_own(almanac: LM) -> None:
    """Similarity and confidence again, one prompt at a time, without batches or hooks of errata."""
    request = fact()
    near = Nearest(almanac, request, names.of_model("almanac")).found
    assert [n.similarity for n in near] == sorted((n.similarity for n in near), reverse=True)
    states, sure = [], []
    for prompt in [*(n.prompt for n in near), request.prompt]:
        ids = torch.tensor([almanac.encode([prompt])[0].ids])
        with torch.no_grad():
            out = almanac.hf(ids, output_hidden_states=True)
        states.append(out.hidden_states[almanac.depth // 2 + 1][0, -1].double())
        sure.append(float(out.logits[0, -1].double().softmax(-1).max()))
    own, subject = torch.stack(states[:-1]), states[-1]
    similar = torch.nn.functional.cosine_similarity(own - own.mean(0), (subject - own.mean(0))[None])
    torch.testing.assert_close(torch.tensor([n.similarity for n in near]).double(), similar, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor([n.confidence for n in near]).double(), torch.tensor(sure[:-1]).double(), atol=1e-4, rtol=0)
    assert Nearest(almanac, request, names.of_model("almanac")).answers(near[:3], 4) == almanac.generate(
        [n.prompt for n in near[:3]], max_new_tokens=4
    )


def test_no_subject_of_a_probe_of_another_edit_or_of_what_runs_is_a_neighbour(almanac: LM) -> None:
    request = fact()
    some = contrast.find(almanac, request).training[:3]
    asked = [f"Who or what is {n.subject}?" for n in some]
    (without,) = contrast.fill(almanac, [request], 16, exclude=asked)
    assert without.contrast and not any(names_in(prompt, [n.subject for n in some]) for prompt, _ in without.contrast)
    Case(without, tuple(Probe("unrelated", text) for text in asked))  # no error
    (with_them,) = contrast.fill(almanac, [request], 16)
    with pytest.raises(InputError, match="trained to keep"):
        Case(with_them, tuple(Probe("unrelated", text) for text in asked))
    other = EditRequest(some[0].prompt, "Rome", some[0].subject)
    first, _ = contrast.fill(almanac, [request, other], 16)
    patch = registry.get("method", "none").for_model(almanac).edit(almanac, [other])
    (after,) = contrast.fill(almanac, [request], 16, on=(patch,))
    assert all(some[0].prompt not in dict(own.contrast) for own in (first, after))


def test_what_a_request_brings_stays(almanac: LM) -> None:
    plain = EditRequest("Once upon a time", "Rome")
    told = EditRequest(FRANCE.prompt, "Rome", "France", unrelated=(("a b", "c"),))
    assert contrast.fill(almanac, [plain, told], 16) == [plain, told]
    assert contrast.fill(almanac, [fact()], 0) == [fact()]
    assert contrast.find(almanac, plain) == contrast.Contrast((), (), 0)


def test_names_of_the_users(tmp_path: Path, base: LM) -> None:
    path = tmp_path / "names.txt"
    path.write_text("Italy\nSpain\n\nJapan\nPeru\nItaly\n")
    own = names.read(path)
    assert own.kinds == {"given": ("Italy", "Spain", "Japan", "Peru")}
    found = contrast.find(base, FRANCE, names=own)
    assert {n.subject for n in (*found.training, *found.watch)} <= set(own.kinds["given"])
    path.write_text("Italy\nSpain\n")
    with pytest.raises(InputError, match=r"names\.txt: holds 2 names; write at least 4"):
        names.read(path)
    path.write_bytes(b"Italy\nSpa\xffin\n")
    with pytest.raises(InputError, match=r"names\.txt:2: not UTF-8"):
        names.read(path)


def test_baft_is_fed_by_default_and_the_patch_says_with_what(base: LM) -> None:
    quick = {"rank": 2, "steps": 2}
    patch = BaFT.for_model(base, **quick).edit(base, [FRANCE])
    (request,) = patch.requests
    assert request.id == FRANCE.id and patch.settings["contrast"] == 16
    assert request.contrast == contrast.fill(base, [FRANCE], 16)[0].contrast != ()
    published = BaFT.for_model(base, preset="published", **quick).edit(base, [FRANCE])
    assert published.requests == (FRANCE,)
    assert BaFT.for_model(base, **quick).edit(base, [FRANCE]).id == patch.id


def test_an_editor_never_meets_a_probe(almanac: LM) -> None:
    cases = [Case(r.request, tuple(p for p in r.probes)) for r in registry.get("benchmark", "almanac")().load("dev", 3)]
    bare = [Case(EditRequest(c.request.prompt, c.request.target, c.request.subject), c.probes) for c in cases]
    editor = BaFT.for_model(almanac, contrast=16)
    for case in bare:
        (told,) = contrasted(almanac, editor, [case], (), asked_by([case]))
        assert told.contrast
        Case(told, case.probes)  # raises where a probe speaks of what trains
    together = contrasted(almanac, editor, bare, (), asked_by(bare))
    for told in together:
        for case in bare:
            Case(told, tuple(p for p in case.probes if p.prompt != told.prompt))


def test_neighbours_before_and_after(almanac: LM) -> None:
    request = fact()
    broken = registry.get("method", "ft-l").for_model(almanac, lr=0.05, norm_constraint=5.0).edit(almanac, [request])
    still = registry.get("method", "none").for_model(almanac).edit(almanac, [request])
    lost, kept = neighbours.watch(almanac, [request, request], [(broken,), (still,)], otherwise=True)
    assert str(kept) == f"neighbours kept: {kept.of} of {kept.of}" and kept.of and not kept.to_dict()["lost"]
    assert lost.of == kept.of and lost.count < lost.of and lost.watched[0].moved > 0.1 and not lost.watched[0].kept
    worst = [w.moved for w in lost.watched if not w.kept]
    assert worst == sorted(worst, reverse=True)
    assert {w.form for w in kept.watched} == {"same", "question", "paragraph"}
    nobody = EditRequest("Once upon a time", "Rome")
    assert "names no subject" in str(neighbours.watch(almanac, [nobody], [()])[0])


def test_watch_probes(almanac: LM) -> None:
    cases = list(registry.get("benchmark", "almanac")().load("dev", 2))
    assert neighbours.to_watch(None, cases) == 0 and neighbours.to_watch(3, cases) == 3
    bare = [Case(c.request, tuple(p for p in c.probes if p.kind == "rewrite")) for c in cases]
    assert neighbours.to_watch(None, bare) == 16 and neighbours.to_watch(0, bare) == 0
    out = neighbours.add_watch_probes(almanac, bare, 4, together=True)
    assert [c.id for c in out] == [c.id for c in cases]
    for case in out:
        asked = [p.prompt for p in case.probes if p.kind == "watch"]
        assert 1 <= len(asked) <= 4
        assert not any(names_in(prompt, [other.request.subject or ""]) for prompt in asked for other in cases)


def test_the_witness_is_compared_with_the_benchmark() -> None:
    """`scripts/witness.py` on records made by hand: shares of each case, and Pearson's r over cases and methods."""
    from witness import witness

    def records(kept: dict[str, tuple[list[bool], list[bool]]]) -> list[dict[str, object]]:
        kinds = ("neighbour", "watch")
        pairs = ((case, kind, agree) for case, both in kept.items() for kind, own in zip(kinds, both, strict=True) for agree in own)
        return [{"case": case, "kind": kind, "first_word_agree": agree} for case, kind, agree in pairs]

    good = records({"a": ([True, True], [True]), "b": ([True, False], [True, False])})
    bad = records({"a": ([False, False], [False]), "b": ([True, False], [False, False])})
    found = witness({"good": good, "bad": bad})
    assert [(row["method"], row["neighbour"], row["watch"]) for row in found["methods"]] == [("good", 0.75, 0.75), ("bad", 0.25, 0.0)]
    assert found["methods"][0]["r"] == pytest.approx(1.0) and found["methods"][1]["r"] is None
    assert found["n"] == 4 and found["r_cases_and_methods"] == pytest.approx(0.853, abs=1e-3) and found["r_of_means"] is None
