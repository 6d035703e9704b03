"""Contrast pairs in the methods that can use them: FT, LoRA, AdaLoRA by the output term, WISE by its margins, GRACE and MELO by radii."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
from codebooks import text as keyed
from families import lm
from torch import Tensor
from torch.nn.functional import kl_div

from errata import registry
from errata.config import build
from errata.core.families import resolve
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.tail import FullForward
from errata.core.weights import delta_weight
from errata.errors import ConfigError
from errata.methods.adapters.editor import PUBLISHED
from errata.methods.adapters.training import generator_of
from errata.methods.codebook.grace import GRACE
from errata.methods.codebook.melo import MELO
from errata.methods.codebook.store import Clusters, FilledCodebook, KeyedText
from errata.methods.finetune.training import DenseTraining
from errata.methods.wise.texts import Texts
from errata.request import EditRequest

PAIRS = (("The capital of Spain is", "Madrid"), ("The capital of Japan is", "Tokyo"), ("The capital of Italy is", "Rome"))
LANGUAGES = (("The language of France is", "French"), ("The language of Spain is", "Spanish"))
FRANCE = EditRequest("The capital of France is", "Tokyo", "France", contrast=PAIRS)
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy", contrast=LANGUAGES)
ROME = EditRequest("In Rome people speak", "French")  # brings none, and none are found for what names no subject
REQUESTS = [FRANCE, ITALY, ROME]
TERM = ["ft-l", "ft-m", "loc-ft", "lora", "adalora"]
ALL = [*TERM, "wise", "wise-light", "grace", "melo"]
seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))])
each_method, with_term = pytest.mark.parametrize("method", ALL), pytest.mark.parametrize("method", TERM)
PLAIN = {
    "ft-m": {"layers": [1], "lr": 5e-3, "steps": 6, "stop": 0.0, "batch_size": 1, "contrast_batch": 4, "prefixes": 0},
    "lora": {**PUBLISHED, "rank": 4, "lr": 0.01, "steps": 6, "dropout": 0.0},
}


@functools.cache
def base(dtype: torch.dtype = torch.float64) -> LM:
    return lm("llama", dtype)


def tensors(patch: Patch) -> dict[str, Tensor]:
    return {f"{i}.{k}": t for i, op in enumerate(patch.ops) for k, t in op.tensors.items()} | dict(patch.state)


def alike(one: Patch, other: Patch, atol: float = 1e-7) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and one.notes["steps"] == other.notes["steps"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-6)


# -- every method ----------------------------------------------------------------------------------------------------


@each_method
def test_off_is_as_before_bit_for_bit(method: str) -> None:
    """Pairs that nobody asked for, and an option that finds no pairs, change nothing."""
    model, bare = base(torch.float32), [dataclasses.replace(r, contrast=(), subject=None) for r in REQUESTS]
    made = laws.editor(method).edit_each(model, bare)
    for settings, requests in (({}, REQUESTS), ({"contrast": 8}, bare)):
        for a, b in zip(made, laws.editor(method, **settings).edit_each(model, requests), strict=True):
            own, other = tensors(a), tensors(b)
            assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)


@each_method
def test_many_at_once_are_as_each_alone_and_by_full_passes(method: str) -> None:
    model, editor = base(), laws.editor(method, contrast=8)
    off = laws.editor(method).edit_each(model, REQUESTS)
    made = editor.edit_each(model, REQUESTS)
    for request, patch, plain in zip(REQUESTS, made, off, strict=True):
        alike(patch, editor.edit(model, [request], runner=FullForward))
        other = tensors(plain)
        changed = any(not torch.allclose(a, other[k], atol=1e-6) for k, a in tensors(patch).items() if k in other)
        if request is not ITALY:  # LoRA's is done after one update, and the first never feels the term: its slope is 0 at the base
            assert changed == (request is FRANCE and method not in ("grace", "melo"))


@each_method
def test_wrong_settings_are_refused(method: str) -> None:
    wrong = [{"contrast": -1}]
    wrong += [{"contrast_weight": -1.0}] if method in TERM else []
    wrong += [{"contrast_share": 1.0}, {"contrast_share": 0.0}] if method in ("grace", "melo") else []
    for settings in wrong:
        with pytest.raises(ConfigError, match=rf"{method}: contrast"):
            laws.editor(method, **settings)


# -- the output term -------------------------------------------------------------------------------------------------


def by_hand(method: str, request: EditRequest, weight: float) -> dict[Site, Tensor]:
    """ΔW of each site by a loop that knows nothing of patches: full passes a text at a time, torch's Adam, torch's divergence."""
    model, editor = base(), plain_editor(method, weight)
    hf = copy.deepcopy(model.hf)
    start = editor.edit(model, [request])
    modules = {op.site: resolve(resolve(hf, model.family.blocks)[op.site.block], model.linear_path(op.site)) for op in start.ops}
    row = model.encode([request.prompt], [request.target])[0]
    pairs = model.encode([p for p, _ in request.contrast], [a for _, a in request.contrast])

    def log_p(ids: tuple[int, ...], net: Any = hf) -> Tensor:
        return net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    with torch.no_grad():
        before = [log_p(pair.ids, model.hf) for pair in pairs]
    leaves, change = parameters(method, editor, start, modules)
    optimiser = torch.optim.Adam(leaves, editor.lr)
    frozen = {site: module.weight.detach().clone() for site, module in modules.items()}
    for module in modules.values():
        del module._parameters["weight"]
    for _ in range(editor.steps):
        for site, module in modules.items():
            module.weight = frozen[site] + change(site)
        said = log_p(row.ids)
        loss = -torch.stack([said[row.prompt_length - 1 + t, o] for t, o in enumerate(row.target)]).mean()
        for pair, old in zip(pairs, before, strict=True):
            end = pair.prompt_length - 1
            kl = kl_div(log_p(pair.ids)[end], old[end], log_target=True, reduction="sum")
            loss = loss + weight * kl / len(pairs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {site: change(site).detach() for site in modules}


def plain_editor(method: str, weight: float) -> Any:
    return build(registry.get("method", method), {**PLAIN[method], "contrast": 3, "contrast_weight": weight})


def parameters(method: str, editor: Any, patch: Patch, modules: dict[Site, Any]) -> tuple[list[Tensor], Callable[[Site], Tensor]]:
    """(what Adam updates, ΔW of a site made of it), at its start."""
    if method == "ft-m":
        weights = {site: torch.zeros_like(m.weight).requires_grad_() for site, m in modules.items()}
        return list(weights.values()), weights.__getitem__
    factors = {}
    for site, module in modules.items():
        own = editor.initial(module.in_features, module.out_features, generator_of(editor.seed, site))
        factors[site] = {k: t.double().requires_grad_() for k, t in own.items()}
    scale = editor.alpha / editor.rank
    return [t for own in factors.values() for t in own.values()], lambda site: scale * factors[site]["B"] @ factors[site]["A"]


@pytest.mark.parametrize("method", ["ft-m", "lora"])
def test_equals_a_plain_loop(method: str) -> None:
    patch = plain_editor(method, 2.0).edit(base(), [FRANCE])
    want = by_hand(method, FRANCE, 2.0)
    assert {op.site for op in patch.ops} == set(want)
    for op in patch.ops:
        torch.testing.assert_close(delta_weight(op), want[op.site], atol=1e-7, rtol=1e-6)


def said(model: LM, stack: tuple[Patch, ...], pairs: tuple[tuple[str, str], ...]) -> Tensor:
    batch = model.batch(model.encode([p for p, _ in pairs]), "left")
    return model.logits(batch, [stack])[:, -1].log_softmax(-1)


@with_term
def test_what_the_base_says_of_other_subjects_moves_less(method: str) -> None:
    model = base()
    moved = []
    for settings in ({}, {"contrast": 3, "contrast_weight": 10.0}):
        patch = laws.editor(method, **settings).edit(model, [FRANCE])
        moved.append(float(kl_div(said(model, (patch,), PAIRS), said(model, (), PAIRS), log_target=True, reduction="batchmean")))
    assert moved[1] < 0.7 * moved[0]


@with_term
def test_training_goes_on_until_the_term_is_satisfied(method: str) -> None:
    """The task alone is below the stop earlier."""
    model, request = base(), dataclasses.replace(FRANCE, target="Rome")
    short, long = (laws.editor(method, contrast=3, contrast_weight=w, steps=60).edit(model, [request]).notes for w in (0.0, 1e3))
    off = laws.editor(method, steps=60).edit(model, [request]).notes
    assert short["steps"] == off["steps"] < long["steps"]


def test_a_mini_batch_holds_the_pairs_of_its_requests() -> None:
    """A joint patch in mini-batches of one: each update sees one request's pairs; of two, both's."""
    model = base()
    for size, want in ((1, [[0, 1, 2], [3, 4], []]), (2, [[0, 1, 2, 3, 4], []]), (3, [[0, 1, 2, 3, 4]])):
        editor = laws.editor("ft-m", contrast=3, contrast_batch=0, batch_size=size, prefixes=0)
        training = DenseTraining(editor, model, [REQUESTS], (), FullForward)
        alive = torch.tensor([0])
        views = [training._view(alive, 0, b) for b in range(training.batches)]
        assert [v.kept[0].numbers.tolist() for v in views] == want


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_going_on_keeps_what_the_last_patch_changed(method: str) -> None:
    """Spain was edited before; as a contrast subject of the next edit it stays edited."""
    model = base()
    spain = laws.editor(method).edit(model, [EditRequest("The capital of Spain is", "Rome", "Spain")])
    france = dataclasses.replace(FRANCE, contrast=(("The capital of Spain is", "Rome"),))
    settings = {"contrast": 1, "contrast_weight": 5.0, "steps": 60}
    both = laws.editor(method, **settings).edit(model, [france], on=(spain,))
    assert spain.id in both.replaces
    assert model.generate(["The capital of Spain is"], stacks=[(both,)], max_new_tokens=4, stop=("\n",))[0].strip().startswith("Rome")


# -- WISE's margins --------------------------------------------------------------------------------------------------


def test_contrast_pairs_are_further_texts_that_should_not_open_the_memory() -> None:
    model = base()
    bare = dataclasses.replace(FRANCE, unrelated=(("The language of Italy is", "Italian"),))
    off, on = (Texts.of(model, bare, ["", "I am"], "", contrast) for contrast in (False, True))
    assert off.edit == on.edit and on.unrelated == off.unrelated + model.encode([p for p, _ in PAIRS], [a for _, a in PAIRS])
    contexts = Texts.of(model, FRANCE, ["", "I am"], "", True)
    assert len(contexts.unrelated) == 1 + len(PAIRS)  # the contexts themselves stay


# -- radii -----------------------------------------------------------------------------------------------------------


def stream(seed: int, count: int) -> list[KeyedText]:
    """Texts near six centres; half of them bring contrast keys, some near and some far."""
    g = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(6, 5, generator=g, dtype=torch.float64)
    out = []
    for i in range(count):
        key = centres[torch.randint(6, (1,), generator=g)][0] + 0.6 * torch.randn(5, generator=g, dtype=torch.float64)
        label = [3] * int(torch.randint(1, 3, (1,), generator=g))
        own = keyed(key, 7, *label, request=i)
        if i % 2:
            away = key + (0.5 + 2 * torch.rand(1, generator=g).double()) * torch.randn(4, 5, generator=g, dtype=torch.float64)
            own = dataclasses.replace(own, beside=(away, 10 * away[:, :3]))
        out.append(own)
    return out


def contrast_keys(book: Any, texts: list[KeyedText]) -> list[list[Tensor]]:
    """The contrast keys of the texts that each key of the book answers: those it is nearest to and covers, with its label."""
    out: list[list[Tensor]] = [[] for _ in book.radii]
    for t in texts:
        away = torch.linalg.vector_norm(book.keys - t.read, dim=1)
        j = int(away.argmin())
        if t.beside is not None and float(away[j]) <= book.radii[j] and book.labels[j] == t.row.target:
            out[j] += list(t.beside[0])
    return out


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("expand", ["coverage", "moving_average"])
@seeds
def test_a_radius_never_reaches_a_contrast_key(seed: int, expand: str, grow: bool) -> None:
    """However radii widen, keys move and splits follow, in one patch or in two."""
    texts, share = stream(seed, 120), 0.6
    editor = GRACE(eps=1.0, expand=expand, contrast=4, contrast_share=share, contrast_grow=grow)
    book = FilledCodebook(editor, None, texts, 0.0)
    checked = 0
    for key, radius, limit, own in zip(book.book.keys, book.book.radii, book.book.limits, contrast_keys(book.book, texts), strict=True):
        assert radius <= limit
        for away in own:
            assert radius <= share * float((away - key).norm()) + 1e-9
            checked += 1
    assert checked > 50 and sum(map(math.isfinite, book.book.limits)) > 10
    first = FilledCodebook(editor, None, texts[:60], 0.0)
    op = Op("codebook", Site(1, "mlp_down"), {"keys": first.book.keys, "values": torch.stack(first.values), "radii": first.radii})
    second = FilledCodebook(editor, Patch("grace", {}, "", (), (op,), first.book.state()), texts[60:], 0.0)
    assert second.book.labels == book.book.labels and second.book.limits == book.book.limits
    torch.testing.assert_close(second.radii, book.radii)
    torch.testing.assert_close(second.book.keys, book.book.keys)


@pytest.mark.parametrize("grow", [False, True])
@seeds
def test_a_cluster_never_reaches_a_contrast_key(seed: int, grow: bool) -> None:
    texts, share = stream(seed, 120), 0.6
    editor = MELO(radius=1.0, unit="absolute", contrast=4, contrast_share=share, contrast_grow=grow, blocks=1000)
    store = Clusters(editor, None, texts, 0.0)
    beside = {tuple(t.read.tolist()): t.beside[0] for t in texts if t.beside is not None}
    checked = 0
    for centre, radius, limit, own in zip(store.book.keys, store.book.radii, store.book.limits, store.members, strict=True):
        assert radius <= limit
        for key, _ in own:
            for away in beside.get(tuple(key.tolist()), ()):
                assert radius <= share * float((away - centre).norm()) + 1e-9
                checked += 1
    assert checked > 50
    first = Clusters(editor, None, texts[:60], 0.0)
    op, blocks = Op("router", Site(1, "mlp_down"), first.tensors()), Op("routed", Site(2, "mlp_down"), {"up": torch.zeros(0, 1, 1)})
    later = [dataclasses.replace(t, request=t.request) for t in texts[60:]]
    second = Clusters(editor, Patch("melo", {}, "", (), (op, blocks), first.book.state()), later, 0.0)
    torch.testing.assert_close(second.tensors()["radii"], store.tensors()["radii"])
    torch.testing.assert_close(second.tensors()["centres"], store.tensors()["centres"])


@pytest.mark.parametrize("method", ["grace", "melo"])
def test_the_model_answers_contrast_prompts_as_before(method: str) -> None:
    """A radius that covers everything, and one that its contrast pairs hold back; grown from nothing, it is the same."""
    model = base()
    wide = {"unit": "absolute", ("eps" if method == "grace" else "radius"): 1e6}
    none = {"unit": "absolute", ("eps" if method == "grace" else "radius"): 0.0}
    before = said(model, (), PAIRS)
    for settings, kept in ((wide, False), ({**wide, "contrast": 3}, True), ({**none, "contrast": 3, "contrast_grow": True}, True)):
        patch = laws.editor(method, **settings).edit(model, [dataclasses.replace(FRANCE, target="Rome")])
        assert torch.equal(said(model, (patch,), PAIRS), before) == kept
        assert model.generate([FRANCE.prompt], stacks=[(patch,)], max_new_tokens=3)[0].strip().startswith("Rome")
        assert ("limits" in patch.state) == kept and float(patch.ops[0].tensors["radii"][0]) > 0
