"""REP: its op against a pre-hook on changed weights, its training against plain modules, its promise on the almanac, its stacks."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from families import SENTENCES, lm
from torch import nn

import errata
from errata import registry
from errata.config import build
from errata.core.bank import ForwardContext
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.weights import delta_weight
from errata.errors import ConfigError
from errata.methods.locate.editor import LocateEditor
from errata.methods.rep.op import KeyAdaptor, gate_logit
from errata.methods.rep.rep import REP
from errata.methods.rep.run import split_patch
from errata.methods.rep.surfaces import KINDS, OWN, draw
from errata.methods.rep.training import Keys, initial, train
from errata.request import EditRequest
from errata.text import surfaces

PROMPTS = [p for p, _ in SENTENCES]
WRAPPED = {
    "layers": [1], "end": ".", "stats_tokens": 1500, "prefixes": [], "clamp": 20.0, "kl": 0.0, "v_decay": 0.0, "v_lr": 0.2, "v_steps": 20,
}  # fmt: skip
FRANCE = EditRequest("The capital of France is", "Rome", "France", unrelated=(("The language of Spain is", "Spanish"),))
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy", unrelated=(("The capital of Japan is", "Tokyo"),))
QUICK = {
    "wrapped": WRAPPED, "steps": 30, "lr": 0.02, "rank": 4, "closing": 1.0, "match": 1.0, "aggregation": 0.0, "consistency": 10.0,
    "away": 64, "pool": 30, "prefixes": [[5, 2]], "surfaces": ["names", "shuffled", "prefixes"],
}  # fmt: skip


def rep(**settings: object) -> REP:
    return build(REP, {**QUICK, **settings})


def logits(base: LM, stack: tuple[Patch, ...], texts: list[str]) -> torch.Tensor:
    batch = base.batch(base.encode(texts))
    return base.logits(batch, [stack], [0] * len(texts))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_op_is_the_released_pre_hook_on_changed_weights(family: str) -> None:
    """W + ΔW on k + 1[g > τ] B A k, with the module's input replaced, against the patch beside the frozen linear; in float64."""
    base = lm(family, torch.float64)
    patch = rep(scope="shared", tau=0.6).edit(base, [FRANCE])
    site = Site(1, "mlp_down")
    a, b, w1, b1, w2, b2 = (patch.state[f"rep.1.{k}"] for k in ("a", "b", "w1", "b1", "w2", "b2"))
    ours = logits(base, (patch,), PROMPTS)
    other = copy.deepcopy(base.hf)
    from errata.core.families import resolve

    module = resolve(resolve(other, base.family.blocks)[site.block], base.linear_path(site))
    change = delta_weight(next(op for op in patch.ops if op.kind == "low_rank"))
    with torch.no_grad():
        module.weight += change if isinstance(module, nn.Linear) else change.T
    opened = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        k = args[0]
        g = torch.sigmoid(nn.functional.gelu(k @ w1.T + b1) @ w2 + b2).unsqueeze(-1)
        opened.append((g > 0.6).sum())
        return (torch.where(g > 0.6, k + k @ a.T @ b.T, k), *args[1:])

    module.register_forward_pre_hook(hook)
    batch = base.batch(base.encode(PROMPTS))
    theirs = other(input_ids=batch.ids, attention_mask=batch.mask, position_ids=(batch.mask.cumsum(1) - 1).clamp_min(0)).logits
    where = batch.mask.bool()
    torch.testing.assert_close(ours[where], theirs[where], atol=1e-9, rtol=1e-9)
    assert 0 < int(opened[0]) < int(where.sum())
    assert not torch.allclose(ours, logits(base, split_patch(patch)[:1], PROMPTS), atol=1e-3)  # the adaptor does something


def test_a_closed_gate_is_the_identity_bit_for_bit() -> None:
    base = lm("llama")
    patch = rep().edit(base, [FRANCE])
    shut = [
        dataclasses.replace(op, tensors={**op.tensors, "b2": op.tensors["b2"] - 1e6}) if op.kind == "key_adaptor" else op
        for op in patch.ops
    ]
    closed = dataclasses.replace(patch, ops=tuple(shut))
    wrapped = split_patch(patch)[0]
    assert torch.equal(logits(base, (closed,), PROMPTS), logits(base, (wrapped,), PROMPTS))
    x, y = torch.randn(2, 3, 64), torch.randn(2, 3, 32)
    y[0, 0, 0] = -0.0
    op = next(op for op in shut if op.kind == "key_adaptor")
    out = KeyAdaptor.apply(
        {k: t[None] for k, t in op.tensors.items()}, op.settings, x, y, op.site, ForwardContext(torch.zeros(2, 3), torch.tensor([3, 3]))
    )
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


class Released(nn.Module):
    """The module as the specification describes it, out of torch's own parts."""

    def __init__(self, inner: int, rank: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inner, rank, bias=False), nn.Linear(rank, inner, bias=False)
        self.gate = nn.Sequential(nn.Linear(inner, hidden), nn.GELU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, k: torch.Tensor) -> torch.Tensor:
        return k + self.gate(k) * self.up(self.down(k))


def test_training_equals_a_loop_over_plain_modules() -> None:
    """The published losses and Adam, an edit at a time, in float64; several adaptors in one batch are each trained as alone."""
    g = torch.Generator().manual_seed(0)
    inner, rank, hidden, edits, steps, batch = 12, 3, 5, 3, 6, 4
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    e = REP(**REP.PRESETS["published"] | {"dropout": 0.0, "steps": steps, "lr": 1e-2, "consistency": 7.0, "aggregation": 1.5})
    keys = Keys(
        rand(20, inner), torch.randint(20, (steps, edits, batch), generator=g), rand(edits, inner),
        nn.functional.normalize(rand(edits, inner), dim=-1), rand(edits, 0, inner),
    )  # fmt: skip
    start = {k: t.double() for k, t in initial(inner, rank, hidden, False, 0).items()}
    fitted, _ = train(e, keys, {k: t.expand(edits, *t.shape) for k, t in start.items()}, edits)
    for i in range(edits):
        module = Released(inner, rank, hidden).double()
        with torch.no_grad():
            for own, name in zip(
                (
                    module.down.weight,
                    module.up.weight,
                    module.gate[0].weight,
                    module.gate[0].bias,
                    module.gate[2].weight[0],
                    module.gate[2].bias,
                ),
                ("a", "b", "w1", "b1", "w2", "b2"),
                strict=True,
            ):
                own.copy_(start[name])
        adam = torch.optim.Adam(module.parameters(), lr=e.lr)
        for step in range(steps):
            adam.zero_grad()
            moved = module(torch.cat([keys.surfaces[keys.steps[step, i]], keys.own[i : i + 1]]))
            aggregation = -(moved[:-1] / moved[:-1].norm(dim=-1, keepdim=True) @ keys.target[i]).mean()  # without the prompt's own key
            loss = e.aggregation * aggregation + e.consistency * nn.functional.mse_loss(moved[-1], keys.own[i])
            loss.backward()
            adam.step()
        torch.testing.assert_close(fitted["a"][i], module.down.weight.detach(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(fitted["b"][i], module.up.weight.detach(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(fitted["w1"][i], module.gate[0].weight.detach(), atol=1e-9, rtol=1e-9)


def test_adaptors_are_of_the_published_size_and_start_as_torch_starts_them() -> None:
    """12,815,513 numbers a layer on LLaMA-2 (specification §3.3)."""
    made = initial(11_008, 32, int(0.1 * 11_008), False, 0)
    assert sum(t.numel() for t in made.values()) == 12_815_513
    assert not made["b"].any() and float(made["a"].abs().max()) <= 11_008**-0.5
    assert float(made["a"].std()) == pytest.approx(11_008**-0.5 / math.sqrt(3), rel=0.02)


def random_op(seed: int, count: int = 1) -> Op:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (count, 2, 8), "u": (count, 6, 2), "w1": (count, 3, 8), "b1": (count, 3), "w2": (count, 3), "b2": (count,)}
    return Op(
        "key_adaptor",
        Site(0, "mlp_down"),
        {k: torch.randn(s, generator=g) for k, s in shapes.items()},
        {"tau": 0.5, "gate": True, "constant": False},
    )


def apply(op: Op, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return KeyAdaptor.apply(
        {k: t[None] for k, t in op.tensors.items()}, op.settings, x, y, op.site, ForwardContext(torch.zeros(1, 1), torch.tensor([1]))
    )


def test_of_several_adaptors_the_one_that_is_most_open_acts() -> None:
    x, y = torch.randn(4, 5, 8), torch.randn(4, 5, 6)
    ops = [random_op(i) for i in range(40)]  # more than are held at once
    together = apply(KeyAdaptor.fuse(ops, torch.device("cpu")), x, y)
    gates = torch.stack([gate_logit({k: t[None] for k, t in op.tensors.items()}, x)[..., 0] for op in ops])
    alone = torch.stack([apply(op, x, y) for op in ops])
    best = gates.argmax(0)
    want = alone.gather(0, best[None, ..., None].expand(1, *y.shape))[0]
    torch.testing.assert_close(together, torch.where(gates.amax(0)[..., None] > 0, want, y))
    few = KeyAdaptor.fuse(ops[:2], torch.device("cpu"))
    assert (gates[:2].amax(0) <= 0).any() and torch.equal(apply(few, x, y)[gates[:2].amax(0) <= 0], y[gates[:2].amax(0) <= 0])


def test_stacks_join_adaptors_and_taking_one_off_leaves_the_other() -> None:
    base = lm("llama", torch.float64)
    first, second = rep().edit_each(base, [FRANCE, ITALY])
    stack = (first, second)
    plan = base.plan([stack], [0], 1)
    assert [bank.kind for bank in plan.banks[Site(1, "mlp_down")]] == ["low_rank", "key_adaptor"]
    alone = logits(base, (second,), PROMPTS)
    base.attach(*stack)
    assert not torch.allclose(base.logits(base.batch(base.encode(PROMPTS))), alone, atol=1e-3)
    base.detach(first.id)
    assert torch.equal(base.logits(base.batch(base.encode(PROMPTS))), alone)
    base.detach(second.id)


def test_a_patch_that_is_there_can_be_adapted() -> None:
    base = lm("llama")
    made = build(registry.get("method", "rome"), WRAPPED).edit_each(base, [FRANCE, ITALY])
    assert [p.id for p in rep().adapt(base, made)] == [p.id for p in rep().edit_each(base, [FRANCE, ITALY])]
    joint = build(registry.get("method", "memit"), {**WRAPPED, "layers": [0, 1]})
    unequal = [joint.edit(base, [FRANCE, ITALY]), joint.edit(base, [ITALY])]
    counts = [
        len(op.tensors["a"]) for p in rep(wraps="memit", wrapped={**WRAPPED, "layers": [0, 1]}).adapt(base, unequal) for op in p.ops[2:]
    ]
    assert counts == [2, 2, 1, 1]
    with pytest.raises(ConfigError, match="was made with rome"):
        rep(wraps="memit").adapt(base, made)


def test_a_joint_patch_has_an_adaptor_an_edit_or_a_shared_one() -> None:
    base = lm("llama")
    for scope, count in (("edit", 2), ("shared", 1)):
        patch = rep(scope=scope).edit(base, [FRANCE, ITALY])
        op = next(op for op in patch.ops if op.kind == "key_adaptor")
        assert len(op.tensors["a"]) == count and patch.requests == (FRANCE, ITALY)


def test_a_shared_adaptor_goes_on_and_remembers_the_earlier_edit() -> None:
    base = lm("llama", torch.float64)
    e = rep(scope="shared")
    first = e.edit(base, [FRANCE])
    second = e.edit(base, [ITALY], on=(first,))
    assert second.replaces == (first.id,) and second.requests == (FRANCE, ITALY)
    assert len(second.state["rep.1.own"]) == 2 and len(second.ops) == 2
    torch.testing.assert_close(second.state["rep.1.own"][0], first.state["rep.1.own"][0])
    # both changes are in it: of the linear's weight, rank 2
    ops = {op.kind: op for op in second.ops}
    one = delta_weight(next(op for op in first.ops if op.kind == "low_rank"))
    assert (
        torch.linalg.matrix_rank(delta_weight(ops["low_rank"])) == 2 and torch.linalg.matrix_rank(delta_weight(ops["low_rank"]) - one) == 1
    )
    assert [p.id for p in e.edit_each(base, [ITALY], on=(first,))] == [second.id]
    assert e.edit(base, [ITALY], on=(rep(scope="shared", lr=0.01).edit(base, [FRANCE]),)).replaces == ()  # of other settings


def test_alphaedit_finds_the_keys_of_earlier_edits() -> None:
    base = lm("llama", torch.float64)
    wrapped = {**WRAPPED, "share": 0.9, "l2": 1e-3}
    plain = build(registry.get("method", "alphaedit"), wrapped)
    e = rep(wraps="alphaedit", wrapped=wrapped, tau=1 - 1e-9)  # shut: the wrapped edits see what they would see without
    first, bare = e.edit(base, [FRANCE]), plain.edit(base, [FRANCE])
    second, want = e.edit(base, [ITALY], on=(first,)), plain.edit(base, [ITALY], on=(bare,))
    torch.testing.assert_close(delta_weight(split_patch(second)[0].ops[0]), delta_weight(want.ops[0]), atol=1e-9, rtol=1e-6)
    forgetful = plain.edit(base, [ITALY], on=(dataclasses.replace(bare, state={}),))
    assert not torch.allclose(delta_weight(forgetful.ops[0]), delta_weight(want.ops[0]), atol=1e-6)


@pytest.mark.parametrize(
    "without", [{"gate": False}, {"projection": "constant"}, {"normalise": False, "aggregation": 1.0}, {"consistency": 0.0}]
)
def test_ablations_train_what_is_left(without: dict[str, object]) -> None:
    base = lm("llama")
    patch, whole = rep(**without).edit(base, [FRANCE]), rep().edit(base, [FRANCE])
    op, other = (next(op for op in p.ops if op.kind == "key_adaptor") for p in (patch, whole))
    begun = initial(64, 4 if without != {"projection": "constant"} else 1, 6, "projection" in without, 1)
    assert torch.equal(op.tensors["w1"][0], begun["w1"]) == (without == {"gate": False})
    assert torch.equal(op.tensors["a"][0], begun["a"]) == ("projection" in without)
    assert not torch.allclose(op.tensors["u"], torch.zeros_like(op.tensors["u"]))
    assert op.tensors["u"].shape != other.tensors["u"].shape or not torch.allclose(op.tensors["u"], other.tensors["u"])


@pytest.mark.parametrize("method", [m for m in registry.names("method") if issubclass(registry.get("method", m), LocateEditor)])
def test_every_locate_and_edit_method_can_be_wrapped(method: str) -> None:
    base = lm("gpt2")
    settings = {
        **WRAPPED,
        **({"layers": [0, 1]} if method in ("memit", "pmet", "alphaedit") else {}),
        **({"share": 0.9} if method == "alphaedit" else {}),
    }
    patch = rep(wraps=method, wrapped=settings, steps=3).edit(base, [FRANCE])
    assert [op.kind for op in patch.ops] == ["low_rank"] * (len(patch.ops) // 2) + ["key_adaptor"] * (len(patch.ops) // 2)
    again = build(registry.get("method", method), settings).edit(base, [FRANCE])
    assert [delta_weight(a).equal(delta_weight(b)) for a, b in zip(patch.ops, again.ops, strict=False)] == [True] * len(again.ops)


def test_what_trains_is_seen_and_what_is_kept_is_elsewhere() -> None:
    base = errata.load("almanac")
    request = EditRequest("The capital of France is", "Rome", "France", paraphrases=("France has for its capital", "Which town is it?"))
    found = surfaces.make_surfaces(base, request)
    drawn = draw(
        base, request, KINDS, ((5, 2),), steps=4, batch=5, pool=400, away=30, fact_token="subject_last",
        seed=0, name="rep",
    )  # fmt: skip
    assert len(drawn.steps) == 4 and all(len(s) == 5 for s in drawn.steps) and len(drawn.away) == OWN + 30
    said = [base.tokenizer.decode(t.row.ids, skip_special_tokens=True) for t in drawn.texts]
    for unseen in (*found.names_unseen, *found.shuffled_unseen):
        assert not any(surfaces.fill(request, unseen) in text for text in said)
    assert any(found.names_seen[0] in text for text in said) and request.prompt not in said
    assert "France has for its capital" in said and "Which town is it?" not in said  # the second does not name the subject
    for text, placed in zip(said, drawn.texts, strict=True):
        upto = base.tokenizer.decode(placed.row.ids[: placed.at + 1], skip_special_tokens=True)
        assert text.startswith(upto) and text[len(upto) :].strip() in ("is", "has for its capital")  # the place is the name's last token


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_an_edit_of_the_almanac_survives_other_names_and_shuffled_tokens(count: int) -> None:
    """Dev cases: the success of ROME and of REP on it, where both are counted with the same surfaces, unseen ones too."""
    base = errata.load("almanac")
    cases = list(registry.get("benchmark", "almanac")().load("dev", count))
    rome = registry.get("method", "rome").for_model(base)
    score: dict[str, list[float]] = {}
    for name, editor in (("rome", rome), ("rep", REP.for_model(base, wrapped={"v_steps": 25}))):
        patches = editor.edit_each(base, [c.request for c in cases])
        asked, kinds = [], []
        for i, case in enumerate(cases):
            found = surfaces.make_surfaces(base, case.request)
            for kind, names in (("seen", found.names_seen + found.shuffled_seen), ("unseen", found.names_unseen + found.shuffled_unseen)):
                asked += [(i, surfaces.fill(case.request, n), case.request.target) for n in names]
                kinds += [kind] * len(names)
            asked.append((i, case.request.prompt, case.request.target))
            kinds.append("prompt")
        said = base.generate([p for _, p, _ in asked], stacks=[(p,) for p in patches], rows=[i for i, _, _ in asked], max_new_tokens=8)
        for kind in ("prompt", "seen", "unseen"):
            hits = [text.startswith(want) for text, (_, _, want), k in zip(said, asked, kinds, strict=True) if k == kind]
            score.setdefault(kind, []).append(sum(hits) / len(hits))
        del name
    assert score["prompt"][1] == score["prompt"][0] == 1.0
    assert score["seen"][1] > score["seen"][0] + 0.1 and score["unseen"][1] > score["unseen"][0]


def test_bad_settings() -> None:
    for settings, said in (
        ({"wraps": "ft-l"}, "wraps is one of"), ({"surfaces": ["names", "smells"]}, "no surface 'smells'"), ({"tau": 1.0}, "tau lies"),
        ({"wrapped": [1]}, "must map settings"), ({"closing": 1.0, "away": 0}, "away above 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            build(REP, settings)
    with pytest.raises(ConfigError, match="no setting 'v_lrr'"):
        REP(wrapped={"v_lrr": 1}).edit(lm("llama"), [FRANCE])
