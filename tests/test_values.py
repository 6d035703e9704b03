"""Value vectors are those of a plain loop, and stop by themselves; rows that look at one token may run apart from the longer ones, to the
same end."""

from __future__ import annotations

import pytest
import torch
from families import lm
from locating import REQUESTS, SHARED, TIGHT, base, job, make
from torch import Tensor

from errata.config import build
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.read import adds_directly
from errata.core.tail import FullForward, Tail
from errata.core.weights import delta_weight
from errata.methods.locate import values
from errata.methods.locate.editor import LocateEditor
from errata.methods.locate.memit import MEMIT, PMET
from errata.methods.locate.rome import ROME
from errata.methods.locate.run import LocateThenEditRun
from errata.methods.locate.text import prefixes
from errata.request import EditRequest


def plain_value(model: LM, request: EditRequest, texts: list[str], editor: LocateEditor, at_block: bool) -> Tensor:
    """ROME's loop, written out: one request, one text a pass, full forward passes, torch's Adam."""
    block = editor.layers[0]
    module = model.blocks[block] if at_block else model.module(Site(block, "mlp_down"))
    tok = model.tokenizer
    end = request.prompt.find(request.subject) + len(request.subject)
    state: dict[str, object] = {}

    def run(text: str, characters: int, shift: Tensor | None) -> Tensor:
        found = tok(text, return_offsets_mapping=True, return_tensors="pt")
        offsets = found["offset_mapping"][0].tolist()
        at = max(i for i, (a, b) in enumerate(offsets) if a < characters and b > a)

        def hook(_: object, __: object, output: object) -> object:
            y = output[0] if isinstance(output, tuple) else output
            state["v"] = y[0, at].detach()
            if shift is None:
                return None
            y = torch.cat([y[:, :at], (y[:, at] + shift)[:, None], y[:, at + 1 :]], 1)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = module.register_forward_hook(hook)
        try:
            return model.hf(input_ids=found["input_ids"], use_cache=False).logits[0], found["input_ids"][0], at
        finally:
            handle.remove()

    full = [f"{t}{request.prompt} {request.target}" for t in texts]
    kl_text = f"{request.subject} is a"
    with torch.no_grad():
        run(request.prompt, end, None)
        start = state["v"]
        logits, _, at = run(kl_text, len(request.subject), None)
        before = logits[at].log_softmax(-1)
    shift = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([shift], lr=editor.v_lr)
    for step in range(editor.v_steps):
        losses = []
        for prefix, text in zip(texts, full, strict=True):
            logits, ids, _ = run(text, len(prefix) + end, shift)
            first = len(tok(f"{prefix}{request.prompt}")["input_ids"])
            losses.append(-logits[first - 1 : -1].log_softmax(-1).gather(1, ids[first:, None]).mean())
        logits, _, at = run(kl_text, len(request.subject), shift)
        now = logits[at].log_softmax(-1)
        kl = (now.exp() * (now - before)).sum()
        loss = torch.stack(losses).mean() + editor.kl * kl + editor.v_decay * shift.norm() / start.norm() ** 2
        if loss < editor.v_stop or step == editor.v_steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            shift.mul_(min(1.0, float(editor.clamp * start.norm() / shift.norm())))
    return shift.detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("cls", [ROME, MEMIT])
def test_values_are_those_of_a_plain_loop(family: str, cls: type[LocateEditor]) -> None:
    model = base(family)
    editor = make(cls, layers=[1], clamp=0.7, v_decay=0.5)
    found, _ = job(family, editor, [[r] for r in REQUESTS])
    texts = prefixes(model, editor.prefixes, editor.seed)
    assert len(texts) == 4 and texts[0] == "" and all(t.endswith(". ") for t in texts[1:])
    at_block = cls is MEMIT and adds_directly(model, Site(1, "mlp_down"))
    for request, ours, start in zip(REQUESTS, found.goal, found.start, strict=True):
        want = plain_value(model, request, texts, editor, at_block)
        torch.testing.assert_close(ours - start, want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_where_a_norm_follows_all_that_is_optimised_is_written(family: str) -> None:
    """PMET's shift of the attention is never written, and where one block is edited no later one makes up for it: the loss of the patched
    model is about the one that the value was left with, 1 + NLL while the answer is wrong (weights act on other tokens too)."""
    editor = make(PMET, layers=[1], prefixes=[], kl=0.0, v_decay=0.0, clamp=50.0, v_steps=4, mom2_weight=1e-9, fact_token="last")
    _, patches = job(family, editor, [[r] for r in REQUESTS])
    model = base(family)
    assert not adds_directly(model, Site(1, "mlp_down"))
    for request, patch in zip(REQUESTS, patches, strict=True):
        (row,) = model.encode([request.prompt], [request.continuation])
        logits = model.logits(model.batch([row]), [(patch,)])[0, row.prompt_length - 1 : len(row.ids) - 1].log_softmax(-1)
        loss = 1 - logits.gather(1, torch.tensor(row.target)[:, None]).mean()
        assert float(loss) == pytest.approx(patch.notes["loss"], rel=0.15) and loss > 1.5


def test_a_value_stops_by_itself() -> None:
    easy = EditRequest("The capital of France is", "Paris", "France")
    _, patches = job("llama", make(ROME, layers=[1], prefixes=[], v_stop=0.3, kl=0.0), [[easy], [REQUESTS[1]]])
    assert patches[0].notes["steps"] == 0 and patches[0].notes["values stopped"] == 1
    assert patches[1].notes["steps"] == 7 and patches[1].notes["values stopped"] == 0
    assert not delta_weight(patches[0].ops[0]).any()  # nothing to change: the identity


def test_full_forward_passes_reach_the_same_values() -> None:
    editor = make(PMET, layers=[1, 2])
    ours = LocateThenEditRun(editor, base("gpt2"), [REQUESTS], (), Tail).run()[0]
    plain = LocateThenEditRun(editor, base("gpt2"), [REQUESTS], (), FullForward).run()[0]
    for a, b in zip(ours.ops, plain.ops, strict=True):
        torch.testing.assert_close(delta_weight(a), delta_weight(b), **TIGHT)


def test_sampled_texts_depend_on_the_seed_and_their_own_prompt_only() -> None:
    model = lm("llama")
    how = {"top_k": 5, "max_new_tokens": 6, "stop": ()}
    three = model.generate(["The", "The", "In"], seed=1, **how)
    assert model.generate(["In", "The"], seed=1, **how) == [three[2], three[0]]
    many = [model.generate(["The"], seed=seed, **how)[0] for seed in range(20)]
    assert len(set(many)) > 5
    assert all(
        t == model.generate(["The"], **{**how, "top_k": None})[0] for t in model.generate(["The"] * 3, seed=2, **{**how, "top_k": 1})
    )
    assert prefixes(lm("llama"), ((2, 3),), 0) == prefixes(model, ((2, 3),), 0) != prefixes(model, ((2, 3),), 1)


@pytest.mark.parametrize("runner", [Tail, FullForward])
@pytest.mark.parametrize("cls", [ROME, PMET])
def test_kl_rows_apart_or_together_give_the_same_values(monkeypatch: pytest.MonkeyPatch, cls: type, runner: type) -> None:
    base, found, passes = lm("llama", torch.float64), {}, {}
    editor = build(cls, {**SHARED, "layers": [1], "kl": 0.5, "v_stop": 0.0})
    for most in (10**6, -1):  # padding that is suffered: any, none
        monkeypatch.setattr(values, "FIXED_TOKENS_ALONE", most)
        job = LocateThenEditRun(editor, base, [[r] for r in REQUESTS], (), runner)
        job.place()
        before = [0]
        handle = base.hf.register_forward_pre_hook(lambda *_, n=before: n.__setitem__(0, n[0] + 1))
        found[most] = torch.stack([f.delta for f in job.values(None)])
        handle.remove()
        passes[most] = before[0]
    assert passes[-1] > passes[10**6]  # a pass more a step
    torch.testing.assert_close(found[-1], found[10**6], atol=1e-9, rtol=1e-9)
