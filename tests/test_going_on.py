"""Patches that go on from others: what is taken off stays off, and what runs underneath is seen as it runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import lm
from laws import METHODS, asked, editor, exact

from errata.core.bank import active_patches, non_causal
from errata.core.patch import Site
from errata.core.read import activation_hooks, read_activations, truncate
from errata.core.tail import Tail
from errata.methods.wise.run import WISERun
from errata.methods.wise.training import Training


@pytest.mark.parametrize("method", METHODS)
def test_taking_off_a_patch_in_between_brings_none_back_that_a_later_one_holds(method: str) -> None:
    base, stack, few = lm("llama"), (), exact("mistral", method)[1]
    for request in asked(method):
        stack = (*stack, editor(method, **few).edit(base, [request], on=stack))  # type: ignore[attr-defined]
    first, middle, last = stack
    together = active_patches(stack)
    base.attach(*stack)
    base.detach(middle.id)
    assert active_patches(base.stack) == ((first, last) if len(together) == 3 else (last,))
    base.detach(last.id)
    assert active_patches(base.stack) == (first,)
    assert set(last.replaces) == ({first.id, middle.id} if len(together) == 1 else set())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wise_reads_its_own_tokens_behind_what_stands_in_front(family: str) -> None:
    base = lm(family, torch.float64)
    on = (editor("ice").edit(base, asked("ice")[1:2]),)  # type: ignore[attr-defined]
    job = WISERun(editor("wise"), base, on, Tail)
    training = Training(job.editor, base, [job.texts(asked("wise")[0])], job.memories, job.site, job.shape, job.act, job.under, Tail)
    texts = training.texts[0]
    rows = [truncate(row, at) for row in (*texts.edit, *texts.unrelated) for at in range(len(row.ids))]
    rows = [row for row in rows if len(row.ids) > 1]  # BOS stands before the context: what `read` finds last is behind it
    bos = [t == 0 for row in (*texts.edit, *texts.unrelated) for t in range(len(row.ids))]
    real = ~torch.tensor(bos)
    x, o = read_activations(base, rows, [job.site], on=on)[job.site]
    torch.testing.assert_close(training.read["x"][0][real], x)
    torch.testing.assert_close(training.read["o"][0][real], o)
    bare = Training(job.editor, base, [texts], job.memories, job.site, job.shape, job.act, (), Tail)
    torch.testing.assert_close(training.read["x"][0][~real], bare.read["x"][0][~real])  # nothing stands before BOS


LOOKING = {"melo": {}, "wise": {}, "grace": {"replace": "all"}, "retrieval": {"threshold": 0.5}}


@pytest.mark.parametrize("method", LOOKING)
def test_a_state_inside_a_prompt_is_read_as_the_whole_prompt_makes_it(method: str) -> None:
    base, site = lm("llama", torch.float64), Site(3, "mlp_down")
    on = (editor(method, **LOOKING[method]).edit(base, asked(method)[:1]),)  # type: ignore[attr-defined]
    assert non_causal(on)
    rows = base.encode(["The capital of France is", "In Rome people speak"], ["Rome", "French"])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    batch = base.batch(rows)
    plan = base.plan([on], None, len(rows))
    plan.prompt_lengths = batch.prompt_lengths
    with torch.no_grad(), base.running(plan), activation_hooks(base, [site], len(rows), lambda _, x, y: seen.append((x, y)), stop=False):
        base.forward(batch.ids, batch.mask)
    at = [3, 2]
    found = read_activations(base, rows, [site], at=at, on=on)[site]
    for got, want in zip(found, seen[0], strict=True):
        torch.testing.assert_close(got, torch.stack([w[t - len(r.ids)] for w, t, r in zip(want, at, rows, strict=True)]))
    for got, want in zip(read_activations(base, rows, [site], at=at)[site], found, strict=True):
        assert not torch.allclose(got[0], want[0], atol=1e-3)  # the first prompt is one that the patch acts on


def test_rome_on_top_of_a_memory_that_acts_on_its_prompt() -> None:
    """It writes at the key that the prompt has there, not at the base's."""
    base = lm("llama", torch.float64)
    request = asked("rome")[0]
    under = editor("melo").edit(base, [dataclasses.replace(request, target="Madrid")])  # type: ignore[attr-defined]
    patch = editor("rome", layers=[3], fact_token="subject_last").edit(base, [request], on=(under,))  # type: ignore[attr-defined]
    op = patch.ops[0]
    row = base.encode([request.prompt])[0]
    key = read_activations(base, [row], [op.site], at=[4], on=(under,))[op.site][0][0]
    torch.testing.assert_close(op.tensors["down"] @ key, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_an_edit_on_a_scaled_adapter_starts_from_what_that_does(method: str) -> None:
    base = lm("llama", torch.float64)
    first, second = asked(method)[:2]
    half = editor(method).edit(base, [first]).scale(0.5)  # type: ignore[attr-defined]
    still = editor(method, lr=1e-12, steps=1, stop=0.0).edit(base, [second], on=(half,))  # type: ignore[attr-defined]
    batch = base.batch(base.encode([first.prompt, second.prompt]))
    want, got = (base.logits(batch, [stack]) for stack in ((half,), active_patches((half, still))))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert half.scale(0.5).settings["scaled"] == 0.25


def test_wise_serves_what_it_trained_behind_what_stands_in_front() -> None:
    base = lm("llama", torch.float64)
    on = (editor("ice").edit(base, asked("ice")[1:2]),)  # type: ignore[attr-defined]
    request = dataclasses.replace(asked("wise")[0], unrelated=())
    patch = editor("wise", steps=10, stop=0.0, beta=0.0, end="").edit(base, [request], on=on)  # type: ignore[attr-defined]
    row = base.encode([request.prompt], [request.target])
    log_p = base.logits(base.batch(row), [(*on, patch)])[0, -1 - len(row[0].target) : -1].log_softmax(-1)
    nll = -sum(float(log_p[i, token]) for i, token in enumerate(row[0].target)) / len(row[0].target)
    assert patch.notes["loss"] == pytest.approx(nll, abs=1e-5)
