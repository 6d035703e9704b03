"""WISE: TIES by hand, masks, memories over a run of edits, routing by hand, and training against a plain loop."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import SENTENCES, lm

from errata import registry
from errata.config import build
from errata.core.bank import Bank, ForwardContext, compile_plan
from errata.core.families import resolve
from errata.core.fit import SGD, fit
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.tail import FullForward, Tail, split_rows
from errata.errors import ConfigError, ErrataError
from errata.methods.base import preset
from errata.methods.wise.memory import Memories, Memory, entries, ties
from errata.methods.wise.op import SideMemory, activation, pack, packed, unpack
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


# -- TIES and masks --------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    deltas = torch.tensor([[3.0, -1.0, 0.5, 2.0, 0.1], [1.0, 2.0, -4.0, 0.2, -0.3], [-5.0, 0.1, 1.0, 4.0, 0.2]])
    # of 5 entries each keeps 3: [3 -1 . 2 .], [1 2 -4 . .], [-5 . 1 4 .]; sums −1, 1, −3, 6, 0
    want = torch.tensor([-5.0, 2.0, -4.0, 3.0, 0.0])
    torch.testing.assert_close(ties(deltas, [1.0, 1.0, 1.0], 0.6), want)
    # weights 3, 1, 1: sums 5, −1, −3, 10; the first entry is now (3·3 + 1) / 4, the last (3·2 + 4) / 4
    torch.testing.assert_close(ties(deltas, [3.0, 1.0, 1.0], 0.6), torch.tensor([2.5, -1.0, -4.0, 2.5, 0.0]))


def test_ties_identities() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator).double()
    torch.testing.assert_close(ties(a[None], [0.7], 1.0), a)
    same = ties(torch.stack([a, a.abs() * a.sign() * 3]), [1.0, 1.0], 1.0)  # signs agree everywhere: the mean
    torch.testing.assert_close(same, 2 * a)
    torch.testing.assert_close(ties(torch.stack([a, b]), [1.0, 3.0], 1.0), ties(torch.stack([b, a]), [0.75, 0.25], 1.0))  # order, scale
    torch.testing.assert_close(ties(torch.stack([a, b]), [0.5, 0.5], 0.4), -ties(torch.stack([-a, -b]), [0.5, 0.5], 0.4))
    apart = torch.zeros(2, 6)  # entries only one changes stay what they are, whatever its weight
    apart[0, :3], apart[1, 3:] = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-4.0, 5.0, -6.0])
    torch.testing.assert_close(ties(apart, [0.1, 0.9], 0.5), apart.sum(0))
    assert int((ties(a[None], [1.0], 0.3) != 0).sum()) == 15
    for density, weights in ((0.0, [1.0, 1.0]), (1.5, [1.0, 1.0]), (0.5, [1.0]), (0.5, [1.0, 0.0])):
        with pytest.raises(ConfigError, match="ties"):
            ties(torch.stack([a, b]), weights, density)


def test_masks() -> None:
    size = 80_000
    first, second = entries(size, 0.2, 1.0, 0, 0), entries(size, 0.2, 1.0, 0, 1)
    assert torch.equal(first, entries(size, 0.2, 1.0, 0, 0)) and not torch.equal(first, entries(size, 0.2, 1.0, 1, 0))
    assert abs(len(first) / size - 0.2) < 0.01 and bool((first.diff() > 0).all())
    both = len(set(first.tolist()) & set(second.tolist()))
    assert abs(both / size - 0.04) < 0.01  # drawn independently
    pool = entries(size, 1.0, 0.125, 0, 0)
    assert len(pool) == size // 8 and torch.equal(pool, entries(size, 1.0, 0.125, 0, 5))  # exactly an eighth, the same for every mask
    inside = [entries(size, 0.2, 0.125, 0, i) for i in (0, 1)]
    assert all(set(m.tolist()) <= set(pool.tolist()) for m in inside) and not torch.equal(*inside)
    assert abs(len(inside[0]) / len(pool) - 0.2) < 0.02
    with pytest.raises(ConfigError, match="none of 10 weights"):
        entries(10, 1e-9, 1.0, 0, 0)


@pytest.mark.parametrize(("ratio", "form"), [(0.5, "bits"), (0.04, "bits"), (0.02, "index"), (1.0, "bits")])
def test_the_smaller_of_two_forms_is_stored(ratio: float, form: str) -> None:
    for size in (4096, 4099):
        where = entries(size, ratio, 1.0, 0, 0)
        kept = pack(where, torch.ones(len(where)), size)
        assert sorted(kept) == sorted(["values", form]) and torch.equal(unpack(kept), where)
        other = 4 * len(where) if form == "bits" else size // 8
        assert kept[form].numel() * kept[form].element_size() <= other + 1


# -- memories over a run of edits ------------------------------------------------------------------------------------


def plan(**changes: Any) -> Any:
    settings = {
        "mask_ratio": 0.3, "pool": 1.0, "seed": 0, "save_freq": 2, "merge_freq": 4, "retrieve": True, "densities": 0.5, "old_weight": 0.6,
        "act_ratio": 0.8, **changes,
    }  # fmt: skip
    return SimpleNamespace(**settings)


def walk(memories: Memories, acts: list[float]) -> list[Memories]:
    """Edits that add their number to every entry of the open mask, through an op after each (as a stack of patches would)."""
    out = []
    for n, act in enumerate(acts, memories.edits + 1):
        begin = memories.begin(torch.device("cpu"), torch.float64)
        memories = memories.after(dataclasses.replace(begin, values=begin.values + n), act)
        memories = Memories(memories.editor, memories.size).resumed(memories.op(Site(0, "mlp_down"), (10, 20), "silu"), memories.edits)
        out.append(memories)
    return out


def test_retrieve_keeps_memories_and_merges_the_last() -> None:
    p = plan()
    masks = [entries(200, 0.3, 1.0, 0, i) for i in range(5)]
    after = walk(Memories(p, 200), [5.0, 4.0, 7.0, 6.0, 9.0, 3.0, 2.0, 8.0, 1.0])
    assert [len(m.stored) for m in after] == [1, 1, 2, 1, 2, 2, 3, 2, 3]  # save after 2, 6; merge after 4, 8
    assert [m.min_activation for m in after[2].stored] == [4.0, 7.0]
    for i, m in ((0, masks[0]), (1, masks[0])):
        assert torch.equal(after[i].stored[0].where, m)
    assert after[1].stored[0].values.unique().tolist() == [3.0] and after[2].stored[1].values.unique().tolist() == [3.0]
    assert torch.equal(after[2].stored[1].where, masks[1]) and torch.equal(after[4].stored[1].where, masks[2])
    deltas = torch.zeros(2, 200, dtype=torch.float64)
    deltas[0, masks[0]], deltas[1, masks[1]] = 3.0, 7.0
    merged = after[3].stored[0]
    full = torch.zeros(200, dtype=torch.float64)
    full[merged.where] = merged.values
    torch.testing.assert_close(full, ties(deltas, [0.5, 0.5], 0.5))
    assert merged.min_activation == 4.0 and set(full.unique().tolist()) == {0.0, 3.0, 5.0, 7.0}
    assert torch.equal(after[7].stored[0].values, merged.values)  # the first merged memory stays as it is
    assert [m.min_activation for m in after[8].stored] == [4.0, 2.0, 1.0]


def test_merge_keeps_one_and_weighs_it() -> None:
    p = plan(retrieve=False)
    masks = [entries(200, 0.3, 1.0, 0, i) for i in range(4)]
    after = walk(Memories(p, 200), [5.0, 4.0, 7.0, 6.0, 9.0, 3.0, 2.0, 8.0])
    assert [len(m.stored) for m in after] == [1, 1, 2, 1, 2, 2, 3, 1]
    assert all(k.min_activation == min([5.0, 4.0, 7.0, 6.0, 9.0, 3.0, 2.0, 8.0][: i + 1]) for i, m in enumerate(after) for k in m.stored)
    old = torch.zeros(200, dtype=torch.float64)
    old[after[3].stored[0].where] = after[3].stored[0].values
    deltas = torch.zeros(3, 200, dtype=torch.float64)
    deltas[0, masks[2]], deltas[1, masks[3]], deltas[2] = 5.0 + 6.0, 7.0 + 8.0, old
    full = torch.zeros(200, dtype=torch.float64)
    full[after[7].stored[0].where] = after[7].stored[0].values
    torch.testing.assert_close(full, ties(deltas, [0.2, 0.2, 0.6], 0.5))


# -- routing ---------------------------------------------------------------------------------------------------------

SITE = Site(1, "mlp_down")


def memory_op(deltas: list[torch.Tensor], least: list[float], **settings: Any) -> Op:
    outer, inner = deltas[0].shape
    tensors = {"least": torch.tensor(least, dtype=torch.float64)}
    for i, delta in enumerate(deltas):
        where = torch.arange(outer * inner)
        tensors |= {f"{k}.{i}": t for k, t in pack(where, delta.double().flatten(), outer * inner).items()}
    return Op("side_memory", SITE, tensors, {"shape": [outer, inner], "act": "silu", "act_ratio": 0.8, "long": 100, **settings})


def alone(op: Op, x: torch.Tensor, y: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    return Bank(op.kind, op.site, op.settings, SideMemory.stack_params([op], torch.device("cpu"))).apply(x, y, context)


def scene(rows: int = 6, prompt: int = 4, after: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], ForwardContext]:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, prompt + after, 8, dtype=torch.float64, generator=g) for _ in range(2))
    deltas = [torch.randn(8, 8, dtype=torch.float64, generator=g) * 0.3 for _ in range(3)]
    position = torch.arange(prompt + after).expand(rows, -1).clone()
    lengths = torch.full((rows,), prompt)
    position[1] = torch.tensor([-1, -1, 0, 1, 2, 3])  # padded on the left by two
    lengths[1] = 2
    return x, y, deltas, ForwardContext(position, lengths, size=rows)


@pytest.mark.parametrize("act", ["silu", "linear"])
def test_routing_by_hand(act: str) -> None:
    x, y, deltas, context = scene(rows := 16)
    sigma = activation(act)
    size = torch.zeros(rows, 3, dtype=torch.float64)
    for b in range(rows):
        for i, d in enumerate(deltas):
            tokens = [t for t in range(6) if 0 <= context.position[b, t] < context.prompt_lengths[b]]
            assert len(tokens) == (2 if b == 1 else 4)
            norms = [torch.linalg.vector_norm(sigma(y[b, t] + d @ x[b, t]) - sigma(y[b, t])) for t in tokens]
            size[b, i] = sum(norms) / len(norms)
            if act == "linear":  # the paper's form, without an activation of the output
                torch.testing.assert_close(norms[0], torch.linalg.vector_norm(x[b, tokens[0]] @ d.T))
    least = (size.median(0).values / 0.8).tolist()  # each memory is open to about half of the rows
    least[2] = 1e9  # the last to none
    out = alone(memory_op(deltas, least, act=act), x, y, context)
    seen = set()
    for b in range(rows):
        open_ = [i for i in range(3) if size[b, i] >= 0.8 * least[i]]
        best = max(open_, key=lambda i: float(size[b, i]), default=None)
        seen.add(best)
        if best is None:
            assert torch.equal(out[b], y[b])  # bit for bit
        else:
            real = context.position[b] >= 0  # neither padding nor context
            torch.testing.assert_close(out[b][real], (y[b] + x[b] @ deltas[best].T)[real])
            assert torch.equal(out[b][~real], y[b][~real])
    assert seen == {None, 0, 1}  # all three cases occur


def test_a_long_prompt_is_decided_by_its_largest_token() -> None:
    g = torch.Generator().manual_seed(1)
    x, y, d = torch.randn(1, 101, 8, generator=g).double(), torch.zeros(1, 101, 8).double(), torch.eye(8).double()
    norms = torch.linalg.vector_norm(x, dim=-1)[0]
    least = [float(norms.mean() + norms.max()) / 2]
    op = memory_op([d], least, act="linear", act_ratio=1.0)
    long, short = (ForwardContext(torch.arange(n)[None], torch.tensor([n]), size=1) for n in (101, 100))
    torch.testing.assert_close(alone(op, x, y, long), x)
    assert torch.equal(alone(op, x[:, :100], y[:, :100], short), y[:, :100])


def test_later_chunks_follow_the_prompts_decision() -> None:
    x, y, deltas, context = scene()
    least = [0.0 if i == 0 else 1e9 for i in range(3)]
    for op, want in ((memory_op(deltas, least), y + x @ deltas[0].T), (memory_op(deltas, [1e9] * 3), y)):
        alone(op, x[:, :4], y[:, :4], dataclasses.replace(context, position=context.position[:, :4]))
        later = dataclasses.replace(context, position=context.position[:, 4:], is_prefill=False)
        torch.testing.assert_close(alone(op, x[:, 4:] * 100, y[:, 4:], later) - y[:, 4:], (want - y)[:, 4:] * 100)


def patch_of(base: LM, op: Op, name: str) -> Patch:
    return Patch(name, {}, base.fingerprint, (), (op,))


def real_op(base: LM, least: list[float], seed: int) -> Op:
    g = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(32, 64, generator=g) * 0.5 for _ in least]
    return memory_op(deltas, least)


def test_patches_of_one_stack_do_not_read_each_others_decisions() -> None:
    base = lm("llama", torch.float64)
    opened, shut = (patch_of(base, real_op(base, least, 0), name) for least, name in (([0.0], "a"), ([1e9], "b")))
    other = patch_of(base, real_op(base, [1e9, 0.0], 3), "c")
    prompts = [p for p, _ in SENTENCES[:4]]
    for stack, same in (((opened, shut), (opened,)), ((shut, opened), (opened,)), ((shut, other), (other,))):
        both = base.generate(prompts, stacks=[stack], rows=[0] * 4, max_new_tokens=4, stop=())
        assert both == base.generate(prompts, stacks=[same], rows=[0] * 4, max_new_tokens=4, stop=())
    assert base.generate(prompts, stacks=[(opened,)], rows=[0] * 4, stop=()) != base.generate(prompts, stop=())


def test_banks_hold_different_numbers_of_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm("llama", torch.float64)
    stacks = [(patch_of(base, real_op(base, least, i), str(i)),) for i, least in enumerate(([0.0], [1e9, 0.0], [1e9] * 3))]
    plan_ = compile_plan([(), *stacks], torch.tensor([0, 1, 2, 3, 2, 1]), base.device)
    [bank] = plan_.banks[SITE]
    assert bank.params["delta"].shape == (3, 3, 32, 64)
    prompts = [SENTENCES[i][0] for i in range(6)]
    rows, batch = [0, 1, 2, 3, 2, 1], base.batch(base.encode(prompts))
    found = []
    for by_entry in (False, True):
        monkeypatch.setattr(Bank, "_by_entry", lambda self, device, value=by_entry: value)
        found.append(base.logits(batch, [(), *stacks], rows))
        said = base.generate(prompts, stacks=[(), *stacks], rows=rows, max_new_tokens=3, stop=())
        for i, row in enumerate(rows):
            [one] = base.generate([prompts[i]], stacks=[((), *stacks)[row]], rows=[0], max_new_tokens=3, stop=())
            assert said[i] == one
    torch.testing.assert_close(*found)
    untouched = base.logits(batch, [()], [0] * 6)
    assert torch.equal(found[1][3], untouched[3])  # every memory shut: the base, bit for bit
    assert not torch.allclose(found[1][[1, 2, 4, 5]], untouched[[1, 2, 4, 5]], atol=1e-3)


def test_a_tail_on_top_of_a_side_memory_runs_whole_passes() -> None:
    base = lm("llama", torch.float64)
    patch = patch_of(base, real_op(base, [0.0], 0), "a")
    rows = split_rows(base.encode([p for p, _ in SENTENCES[:3]], [t for _, t in SENTENCES[:3]]), 2, 0, base.device)
    tail, whole = Tail(base, rows, 2, (patch,)), FullForward(base, rows, 2, (patch,))
    assert tail.whole is not None
    torch.testing.assert_close(tail.logits([]), whole.logits([]))


# -- training --------------------------------------------------------------------------------------------------------


def plain_loop(base: LM, request: EditRequest, e: WISE, site: Site, on_text: bool) -> tuple[torch.Tensor, float]:
    """(ΔW [O, I], mean Δ(x_e)) by full forward passes, one text at a time, a cloned weight and torch's SGD."""
    hf = copy.deepcopy(base.hf)
    module = resolve(resolve(hf, base.family.blocks)[site.block], base.family.linear_path(site.point))
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
    for step in range(e.steps + 1):
        losses, acts = [], []
        for row in (*edit, *unrelated):
            logits, o = forward(row, True)
            with torch.no_grad():
                _, own = forward(row, False)
            tokens = len(row.ids) if on_text else row.prompt_length
            acts.append((sigma(o) - sigma(own))[:tokens].norm(dim=-1).mean())
            if len(acts) <= len(edit):
                nll = torch.nn.functional.cross_entropy(logits[row.prompt_length - 1 : -1], torch.tensor(row.target))
                losses.append(nll)
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
    return delta.detach(), float(torch.stack(acts[: len(edit)]).detach().mean())


@pytest.mark.parametrize("runner", [Tail, FullForward])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"layer": 1, "unit": 2.0}),
        ("llama", {"layer": 3, "act_on": "text", "mask_ratio": 1.0, "pool": 0.25}),  # the last block: only labelled tokens run
        ("gpt2", {"layer": 1}),
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

    got = fit({"x": begin}, loss, steps=60, optimizer=SGD(1.0, 0.01), stop=0.05, min_delta=1e-3)
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


def test_a_stored_memory_is_read_back_whole() -> None:
    memories = Memories(plan(), 200)
    memory = Memory(entries(200, 0.3, 1.0, 0, 0), torch.arange(float(len(entries(200, 0.3, 1.0, 0, 0)))), 2.0)
    op = dataclasses.replace(memories, stored=(memory,) * 12, edits=24).op(SITE, (10, 20), "silu")
    assert all(torch.equal(unpack(packed(op, i)), memory.where) for i in range(12))  # "values.1" and "values.11" are not mixed up
    back = memories.resumed(op, 24)
    assert len(back.stored) == 12 and torch.equal(back.stored[11].values, memory.values)
