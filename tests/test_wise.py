"""WISE's training against a plain loop, its loss and when it stops, the edits it makes one after the other, and its settings."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm
from side_memories import memory_op, patch_of, real_op

from errata import registry
from errata.config import build
from errata.core.families import resolve
from errata.core.fit import SGD, fit
from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import FullForward, Tail
from errata.errors import ConfigError, ErrataError
from errata.methods.base import preset
from errata.methods.wise.memory import entries
from errata.methods.wise.op import SideMemory
from errata.methods.wise.texts import Texts, contexts
from errata.methods.wise.training import margins
from errata.methods.wise.wise import WISE, WISELight
from errata.request import EditRequest

QUICK: dict[str, Any] = {
    "layer": 0, "contexts": [], "end": ".", "lr": 2.0, "steps": 40, "alpha": 0.1, "beta": 0.5, "gamma": 0.2, "mask_ratio": 0.8,
    "norm_constraint": None, "stop": 0.1, "settled": 10.0,
}  # fmt: skip
ROME = EditRequest("The capital of France is", "Rome", "France", unrelated=(("The language of Spain is", "Spanish"),))
SPANISH = EditRequest("The language of Italy is", "Spanish", "Italy", unrelated=(("The capital of Japan is", "Tokyo"),))
FRENCH = EditRequest("In Rome people speak", "French", "Rome", unrelated=(("The capital of Spain is", "Madrid"),))


def wise(**settings: Any) -> WISE:
    return build(WISE, {**QUICK, **settings})


# -- training --------------------------------------------------------------------------------------------------------


def plain_loop(base: LM, request: EditRequest, e: WISE, site: Site, on_text: bool) -> tuple[torch.Tensor, float]:
    """(ΔW [O, I], mean Δ(x_e)) by full forward passes, one text at a time, a cloned weight and torch's SGD."""
    hf = copy.deepcopy(base.hf)
    module = resolve(resolve(hf, base.family.blocks)[site.block], base.linear_path(site))
    conv = type(module).__name__ == "Conv1D"
    frozen = module.weight.detach().clone()
    size = frozen.numel()
    shape = tuple(frozen.T.shape) if conv else tuple(frozen.shape)
    mask = torch.zeros(size).double()
    mask[entries(size, e.mask_ratio, e.pool, e.seed, 0)] = 1
    mask = mask.view(shape)
    delta = torch.zeros(shape).double().requires_grad_()
    optimiser = torch.optim.SGD([delta], lr=e.lr, weight_decay=e.weight_decay)
    sigma = torch.nn.functional.silu if base.name == "llama" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    before = contexts(base, e.contexts)
    edit = base.encode([f"{c} {request.prompt}".strip() for c in before], [request.target + e.end] * len(before))
    unrelated = base.encode([p for p, _ in request.unrelated], [a for _, a in request.unrelated])
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, a, y: outputs.append(y[0]))

    def forward(row: Any, changed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        weight = frozen + (delta.T if conv else delta) if changed else frozen
        outputs.clear()
        logits = torch.func.functional_call(hf, {name: weight}, kwargs={"input_ids": torch.tensor([row.ids])}).logits[0]
        return logits, outputs[0]

    name = next(n for n, p in hf.named_parameters() if p is module.weight)
    acts: list[torch.Tensor] = []
    for step in range(e.steps + 1):
        losses, before_it, acts = [], acts, []
        for row in (*edit, *unrelated):
            logits, o = forward(row, True)
            with torch.no_grad():
                _, own = forward(row, False)
            tokens = len(row.ids) if on_text else row.prompt_length
            acts.append((sigma(o) - sigma(own))[:tokens].norm(dim=-1).mean())
            if len(acts) <= len(edit):
                nll = torch.nn.functional.cross_entropy(logits[row.prompt_length - 1 : -1], torch.tensor(row.target))
                m = len(row.target)
                losses.append(nll * m / (m + 1) if e.edit_mean == "m+1" else nll)
        x_e, x_u = torch.stack(acts[: len(edit)]) / e.unit, torch.stack(acts[len(edit) :]) / e.unit
        loss = torch.stack(losses).mean()
        for hinge in (x_u - e.alpha, e.beta - x_e, (e.gamma + x_u[None] - x_e[:, None]).flatten()):
            loss = loss + (hinge[hinge > 0].mean() if bool((hinge > 0).any()) else 0.0)
        if step == e.steps:
            break
        optimiser.zero_grad()
        loss.backward()
        delta.grad.mul_(mask)
        optimiser.step()
        with torch.no_grad():
            delta.clamp_(-e.norm_constraint, e.norm_constraint)
    handle.remove()
    counted = before_it if e.least == "before" else acts
    return delta.detach(), float(torch.stack(counted[: len(edit)]).detach().mean())


@pytest.mark.parametrize("runner", [Tail, FullForward])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"layer": 1, "unit": 2.0}),
        ("llama", {"layer": 3, "act_on": "text", "mask_ratio": 1.0, "pool": 0.25}),  # the last block: only labelled tokens run
        ("gpt2", {"layer": 1}),
        ("llama", {"layer": 1, "edit_mean": "m+1", "least": "before"}),  # as released
        ("gpt2", {"layer": 2, "point": "mlp.c_fc"}),
    ],
)
def test_training_equals_a_plain_loop(family: str, settings: dict[str, Any], runner: Any) -> None:
    base = lm(family, torch.float64)
    two = dataclasses.replace(ROME, unrelated=(*ROME.unrelated, ("In Rome people speak", "Italian")))
    e = wise(
        contexts=[[3, 2]],
        steps=6,
        lr=0.3,
        weight_decay=0.01,
        norm_constraint=0.05,
        mask_ratio=0.5,
        alpha=0.2,
        beta=3.0,
        gamma=1.0,
        stop=0.0,
    )
    e = dataclasses.replace(e, **settings)
    want, act = plain_loop(base, two, e, e.target_site(base), e.act_on == "text")
    # beside a second problem, which must not matter
    patch, _ = e.edit_each(base, [two, SPANISH], runner=runner)
    found = SideMemory.stack_params(patch.ops, base.device)["delta"][0, 0]
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-7)
    assert abs(float(patch.ops[0].tensors["least"][0]) - act) < 1e-8
    assert (
        float(want.abs().max()) == 0.05 and float((want.abs() == 0.05).double().mean()) < 0.9
    )  # the clamp binds somewhere, not everywhere
    assert patch.notes["steps"] == 6


def test_only_entries_of_the_mask_change() -> None:
    base = lm("llama")
    for method in (WISE, WISELight):
        e = build(method, {**QUICK, "mask_ratio": 0.3})
        [patch] = e.edit_each(base, [ROME])
        delta = SideMemory.stack_params(patch.ops, base.device)["delta"].flatten()
        allowed = entries(32 * 64, 0.3, e.pool, 0, 0)
        assert set(delta.nonzero().flatten().tolist()) <= set(allowed.tolist())
        assert int((delta != 0).sum()) > 0.9 * len(allowed) and patch.ops[0].tensors["values.0"].numel() == len(allowed)


def test_margins_by_hand() -> None:
    edit, unrelated = torch.tensor([[1.0, 6.0], [9.0, 9.0]]), torch.tensor([[4.0, 1.0], [0.5, 77.0]])
    given = torch.tensor([[True, True], [True, False]])
    # alpha 2: 4 − 2; beta 5: 5 − 1; gamma 3: pairs (1,4) 6, (1,1) 3, (6,4) 1, (6,1) −2 -> 10/3.  Second: all satisfied
    torch.testing.assert_close(margins(edit, unrelated, given, 2.0, 5.0, 3.0), torch.tensor([2.0 + 4.0 + 10 / 3, 0.0]))
    none = torch.zeros(2, 0)
    torch.testing.assert_close(margins(edit, none, none.bool(), 2.0, 5.0, 3.0), torch.tensor([4.0, 0.0]))


def test_sgd_and_the_two_stop_conditions() -> None:
    begin = torch.tensor([[3.0], [0.02], [1.0]])
    rate = torch.tensor([0.1, 0.001, 0.45])

    def loss(p: Any, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rate[alive] * p["x"][:, 0].square(), p["x"][:, 0].abs()

    got = fit({"x": begin}, loss, steps=60, optimizer=SGD(1.0, 0.01), stop=0.05, max_change=1e-3)
    for i in range(3):
        x = begin[i].clone().requires_grad_()
        optimiser, last, steps = torch.optim.SGD([x], lr=1.0, weight_decay=0.01), float("inf"), 0
        while steps < 60 and not (x.abs() < 0.05 and (x.abs() - last).abs() <= 1e-3):
            last = float(x.detach().abs())
            optimiser.zero_grad()
            (rate[i] * x.square()).sum().backward()
            optimiser.step()
            steps += 1
        assert int(got.steps[i]) == steps and bool((got.params["x"][i] - x).abs() < 1e-6)
    assert got.steps[1] == 1  # below the stop at once, but its move is not known before a step
    assert int(fit({"x": begin}, loss, steps=60, optimizer=SGD(1.0, 0.01), stop=0.05).steps[1]) == 0
    assert got.steps.unique().numel() == 3


def test_contexts_are_greedy_and_kept() -> None:
    base = lm("llama")
    found = contexts(base, [(2, 5), (4, 3)])
    assert (
        found[0] == ""
        and len(set(found)) == len(found) <= 9
        and all(t.split()[0] in ("I", "You", "Because", "Yes", "Q:") for t in found[1:])
    )
    base.attach(patch_of(base, dataclasses.replace(memory_op([torch.ones(32, 64)], [0.0])), "on"))
    assert contexts(base, [(2, 5), (4, 3)]) is found
    base.base_cache.clear()
    assert contexts(base, [(2, 5), (4, 3)]) == found  # of the base, whatever is attached
    texts = Texts.of(base, EditRequest("In Rome people speak", "French"), found, "")
    assert len(texts.edit) == len(found) and len(texts.unrelated) == len(found) - 1  # without unrelated texts, the contexts
    assert len(Texts.of(base, FRENCH, found, "").unrelated) == 1


# -- editing ---------------------------------------------------------------------------------------------------------


def test_continual_editing_is_one_joint_edit_made_in_steps() -> None:
    base = lm("llama")
    e = wise(save_freq=1, merge_freq=2, steps=10)
    stack: tuple[Patch, ...] = ()
    for request in (ROME, SPANISH, FRENCH):
        patch = e.edit(base, [request], on=stack)
        assert patch.replaces == tuple(p.id for p in stack)
        stack = (*stack, patch)
    joint = e.edit(base, [ROME, SPANISH, FRENCH])
    assert joint.requests == patch.requests and int(patch.state["edits"]) == 3
    assert joint.ops[0].tensors.keys() == patch.ops[0].tensors.keys() and len(patch.ops[0].tensors["least"]) == 2
    for name, t in joint.ops[0].tensors.items():
        assert torch.equal(t, patch.ops[0].tensors[name])
    other = wise(save_freq=1, merge_freq=2, steps=11).edit(base, [ROME], on=stack)
    assert not other.replaces  # other settings: it stands on its own
    above = dataclasses.replace(patch_of(base, real_op(base, [1e9], 0), "x"))
    again = e.edit(base, [FRENCH], on=(*stack, above))
    assert again.replaces == (*patch.replaces, patch.id)  # also where another patch stands above


def test_a_patch_from_before_a_setting_existed_goes_on_as_if_at_its_default(tmp_path: Path) -> None:
    base = lm("llama")
    old = wise(steps=5).edit(base, [ROME])
    younger = ("edit_mean", "least")
    old = dataclasses.replace(old, settings={k: v for k, v in old.settings.items() if k not in younger})
    old.save(tmp_path / "old")
    old = Patch.load(tmp_path / "old")
    assert wise(steps=5).edit(base, [SPANISH], on=(old,)).replaces == (old.id,)
    assert not wise(steps=5, least="before").edit(base, [SPANISH], on=(old,)).replaces


def test_the_least_activation_of_an_edit_that_stops_is_that_of_its_weights() -> None:
    base = lm("llama")
    after, before = (wise(least=least, steps=40).edit(base, [ROME]) for least in ("after", "before"))
    assert after.notes["steps"] < 40 and torch.equal(after.ops[0].tensors["least"], before.ops[0].tensors["least"])
    after, before = (wise(least=least, steps=3, stop=0.0).edit(base, [ROME]) for least in ("after", "before"))
    assert torch.equal(after.ops[0].tensors["values.0"], before.ops[0].tensors["values.0"])
    assert not torch.equal(after.ops[0].tensors["least"], before.ops[0].tensors["least"])


def test_memories_keep_edits_apart() -> None:
    base = lm("llama")
    patch = wise(save_freq=1, merge_freq=5).edit(base, [ROME, SPANISH, FRENCH])
    assert len(patch.ops[0].tensors["least"]) == 3
    with base.under(patch):
        right = [base.complete(r.prompt) == r.target for r in (ROME, SPANISH, FRENCH)]
    assert sum(right) >= 2
    with base.under(patch):
        assert base.complete("The capital of Spain is") == "Madrid"


def test_bad_settings_and_models_raise() -> None:
    base = lm("llama")
    for bad in (
        {"steps": 0}, {"lr": 0.0}, {"alpha": -1.0}, {"mask_ratio": 0.0}, {"pool": 1.1}, {"densities": 0.0}, {"old_weight": 1.0},
        {"norm_constraint": 0.0}, {"act_ratio": 0.0}, {"unit": -1.0}, {"save_freq": 0}, {"save_freq": 3, "merge_freq": 4},
        {"contexts": [[5]]}, {"contexts": [[0, 5]]}, {"seed": -1}, {"activation": "both"}, {"act_on": "all"},
        {"edit_mean": "m + 1"}, {"least": "last"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            wise(**bad)
    for bad in ({"layer": 4}, {"layer": -1}, {"point": "block"}, {"point": "mlp.nothing"}):
        with pytest.raises(ErrataError, match=r"block|linear"):
            wise(**bad).edit(base, [ROME])
    with pytest.raises(ConfigError, match="nothing to edit"):
        wise().edit(base, [])
    assert wise().edit_each(base, []) == []
    assert wise(norm_constraint=1).norm_constraint == 1.0  # an integer is a bound too


def test_presets_and_the_rule_for_depth() -> None:
    assert preset(WISE, "meta-llama/Llama-2-7b-hf")["layer"] == 27
    assert preset(WISE, "Meta-Llama-3-8B-Instruct") == {
        "layer": 29,
        "alpha": 2.0,
        "beta": 20.0,
        "gamma": 10.0,
        "lr": 0.9,
        "steps": 30,
        "act_ratio": 0.5,
    }
    assert preset(WISE, "gpt2")["layer"] == 8 and "layer" not in preset(WISE, "gpt2-xl")
    base = lm("llama")
    assert WISE().target_site(base) == Site(3, "mlp_down") and WISE().act(base) == "silu" and WISE(activation="input").act(base) == "linear"
    assert WISE().act(lm("gpt2")) == "gelu_new" and WISE().act(lm("gemma")) == "gelu_pytorch_tanh"
    assert registry.get("method", "wise-light")().pool == 0.125
    for name in {**WISE.PRESETS, **WISELight.PRESETS}:
        build(WISE, WISE.PRESETS.get(name, {}))
        build(WISELight, WISELight.PRESETS.get(name, {}))
