"""MELO: its vector store against a plain re-implementation, its blocks against a plain loop, its routing by hand."""

from __future__ import annotations

import pytest
import torch
from families import lm

from errata.core.bank import ForwardContext, active_patches
from errata.core.fit import AdamW, fit
from errata.core.patch import Patch, Site
from errata.core.tail import FullForward
from errata.core.tokens import Encoded
from errata.errors import ConfigError
from errata.methods.codebook.melo import MELO
from errata.methods.codebook.op import Routed, Router, route
from errata.methods.codebook.store import Clusters, KeyedText
from errata.methods.codebook.training import fresh
from errata.request import EditRequest

FRANCE = EditRequest("The capital of France is", "Rome", "France")
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy")
SPEAK = EditRequest("In Rome people speak", "French", "Rome")
QUICK = {"layer": 0, "lora_layers": (1, 2), "radius": 0.1, "blocks": 4, "lr": 0.02, "steps": 30, "end": "."}
HERE = Site(0, "mlp_down")


def text(key: torch.Tensor, *label: int, request: int = 0) -> KeyedText:
    return KeyedText(request, Encoded((1, 2, *label), 2), key, -key)


def plain(texts: list[KeyedText], radius: float, per_block: int) -> list[dict]:
    """The rules as the source has them: a list of clusters with lists of points, one text after another."""
    table: list[dict] = []
    for t in texts:
        q, block = t.read, t.request // per_block
        away = [float((c["centre"] - q).norm()) for c in table]
        j = min(range(len(table)), key=away.__getitem__, default=-1)
        new = {"centre": q, "radius": radius, "label": t.row.target, "points": [(q, block)]}
        if j < 0 or away[j] > table[j]["radius"] + radius:
            table.append(new)
        elif table[j]["label"] == t.row.target:
            table[j]["points"].append((q, block))
            keys = [k for k, _ in table[j]["points"]]
            table[j]["centre"] = sum(keys) / len(keys)
            table[j]["radius"] = max(radius, *(float((k - table[j]["centre"]).norm()) for k in keys))
        else:
            table[j]["radius"], new["radius"] = away[j] / 2 - 1e-5, away[j] / 2 + 1e-5
            table.append(new)
            table[j]["points"] = [p for p in table[j]["points"] if float((p[0] - table[j]["centre"]).norm()) <= table[j]["radius"]]
    return table


def answer(table: list[dict], q: torch.Tensor) -> int:
    away = [float((c["centre"] - q).norm()) for c in table]
    j = min(range(len(table)), key=away.__getitem__)
    if away[j] > table[j]["radius"] or not table[j]["points"]:
        return -1
    return min(table[j]["points"], key=lambda p: float((p[0] - q).norm()))[1]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_the_store_is_that_of_the_rules_applied_one_by_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    which = torch.randint(6, (90,), generator=generator)
    keys = centres[which] + 0.5 * torch.randn(90, 5, generator=generator, dtype=torch.float64)
    labels = (torch.rand(90, generator=generator) < 0.15).long().tolist()
    texts = [text(k, 7, *[3] * label, request=i) for i, (k, label) in enumerate(zip(keys, labels, strict=True))]
    editor = MELO(radius=1.0, unit="absolute", edits_per_block=4)
    store, table = Clusters(editor, None, texts, 0.0), plain(texts, 1.0, 4)
    made = store.tensors()
    torch.testing.assert_close(made["centres"], torch.stack([c["centre"] for c in table]), atol=1e-12, rtol=0)
    assert made["radii"].tolist() == pytest.approx([c["radius"] for c in table], abs=1e-9)
    assert store.book.labels == [c["label"] for c in table]
    points = [(i, block, key) for i, c in enumerate(table) for key, block in c["points"]]
    assert made["cluster"].tolist() == [i for i, _, _ in points] and made["block"].tolist() == [b for _, b, _ in points]
    torch.testing.assert_close(made["points"], torch.stack([key for _, _, key in points]))
    assert store.counts["forgotten"] == 90 - len(points) > 0 and min(store.counts[k] for k in ("added", "split", "joined")) > 0
    asked = torch.cat([keys, centres, keys + 0.4 * torch.randn(90, 5, generator=generator, dtype=torch.float64)])
    want = [answer(table, q) for q in asked]
    assert route(made, asked, 0.0).tolist() == want and -1 in want and len(set(want)) > 5
    own = {k: t.expand(len(asked), *t.shape) for k, t in made.items()}  # a store a row
    assert route(own, asked, 0.0).tolist() == want


def test_merge_split_and_forget_by_hand() -> None:
    at = [torch.tensor([x, 0.0], dtype=torch.float64) for x in (0.0, 1.5, 3.0)]
    editor = MELO(radius=1.0, unit="absolute", edits_per_block=1)
    merged = Clusters(editor, None, [text(at[0], 5), text(at[1], 5, request=1)], 0.0)
    assert merged.book.keys.tolist() == [[0.75, 0.0]] and merged.book.radii == [1.0]
    assert route(merged.tensors(), torch.stack([at[0] - 0.1, at[1] + 0.1, at[2]]), 0.0).tolist() == [0, 1, -1]
    parted = Clusters(
        editor, None, [text(at[0], 5), text(at[1], 5, request=1), text(torch.tensor([1.25, 0.0], dtype=torch.float64), 6, request=2)], 0.0
    )
    assert parted.book.radii == pytest.approx([0.25 - 1e-5, 0.25 + 1e-5])  # centre .75, the new one .5 from it: both points are outside
    assert parted.counts["forgotten"] == 2 and parted.tensors()["cluster"].tolist() == [1]
    asked = torch.tensor([[0.75, 0.0], [0.0, 0.0], [1.25, 0.0]], dtype=torch.float64)
    assert route(parted.tensors(), asked, 0.0).tolist() == [-1, -1, 2]  # in the emptied cluster; nowhere; in the new one
    taken = Clusters(editor, None, [text(at[0], 5), text(at[0] + 1e-9, 6, request=1)], 1.0)
    assert taken.book.radii == [1.0] and taken.tensors()["block"].tolist() == [1] and taken.counts["forgotten"] == 1
    output = Clusters(MELO(radius=1.0, unit="absolute", reads="output"), None, [text(at[1], 5)], 0.0)
    assert output.book.keys.tolist() == [[-1.5, 0.0]]


def test_none_chosen_is_the_identity_bit_for_bit_and_a_block_is_a_scaled_low_rank_change() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 4, 6, generator=generator)
    key, zero = x[1, 3][None, None], torch.zeros(1, 1, dtype=torch.long)
    book = {"centres": key, "radii": torch.ones(1, 1), "points": key, "cluster": zero, "block": zero + 1}
    p = {"down": torch.randn(1, 2, 3, 8, generator=generator), "up": torch.randn(1, 2, 6, 3, generator=generator)}
    context = ForwardContext(torch.arange(4).expand(3, 4), torch.tensor([4, 4, 4]), {}, True, {}, None, 3)
    assert torch.equal(Router.apply(book, {"reads": "input", "rounding": 0.0}, x, y, HERE, context), y)
    assert context.recorded[HERE, "block"].tolist() == [[-1] * 4, [1] * 4, [-1] * 4]
    out = Routed.apply(p, {"scale": 2.0}, x, y, Site(1, "mlp_down"), context)
    assert torch.equal(out[[0, 2]], y[[0, 2]])
    torch.testing.assert_close(out[1], y[1] + 4.0 * x[1] @ (p["up"][0, 1] @ p["down"][0, 1]).T)
    empty = {k: t[:, :0] for k, t in book.items()}
    again = ForwardContext(torch.arange(4).expand(3, 4), torch.tensor([4, 4, 4]), None, True, {}, None, 3)
    Router.apply(empty, {"reads": "input", "rounding": 0.0}, x, y, HERE, again)
    assert torch.equal(Routed.apply(p, {"scale": 2.0}, x, y, Site(1, "mlp_down"), again), y)


def test_training_is_a_plain_loop_of_adam_with_a_falling_rate() -> None:
    base = lm("llama", torch.float64)
    editor = MELO(**{**QUICK, "lr": 0.005, "steps": 12, "decay_every": 5, "rank": 3})
    sites = (Site(1, "mlp_down"), Site(2, "mlp_down"))
    for request, patch in zip((FRANCE, SPEAK), editor.edit_each(base, [FRANCE, SPEAK]), strict=True):
        (row,) = base.encode([request.prompt], [request.target + "."])
        start = fresh(editor, base, sites, 0, torch.zeros(1, dtype=torch.float64))
        assert float(start["down.0"].abs().max()) <= 12**-0.5 and float(start["up.1"].abs().max()) == 0.0
        leaves = {k: t.clone().requires_grad_() for k, t in start.items()}
        optimiser = torch.optim.Adam(leaves.values(), lr=0.005)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, 5, 0.5)

        def add(i: int, leaves=leaves):  # type: ignore[no-untyped-def]
            return lambda _, a, o: o + 4.0 * (a[0] @ leaves[f"down.{i}"].T) @ leaves[f"up.{i}"].T

        handles = [base.blocks[b].mlp.down_proj.register_forward_hook(add(i)) for i, b in enumerate((1, 2))]
        ids = torch.tensor([row.ids])
        labels = ids.masked_fill(torch.arange(len(row.ids)) < row.prompt_length, -100)
        for _ in range(12):
            optimiser.zero_grad()
            base.hf(input_ids=ids, labels=labels).loss.backward()
            optimiser.step()
            schedule.step()
        for handle in handles:
            handle.remove()
        for i in (0, 1):
            for name in ("down", "up"):
                torch.testing.assert_close(patch.ops[1 + i].tensors[name][0], leaves[f"{name}.{i}"].detach(), atol=1e-6, rtol=1e-5)
    assert patch.ops[1].settings["scale"] == 2.0


def test_a_schedule_scales_the_rate_and_gradients_may_lie_in_memory_as_they_like() -> None:
    """The fused kernel reads memory in order: the gradient of a matrix that was used transposed must not be taken for another."""
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(3, 6, 4, generator=generator).double(), torch.randn(3, 6, 5, generator=generator).double()
    start = torch.randn(3, 5, 4, generator=generator).double()

    def loss(p, alive):  # type: ignore[no-untyped-def]
        value = (x[alive] @ p["w"].mT - goal[alive]).square().sum((1, 2))
        return value, value

    ours = fit({"w": start}, loss, steps=9, optimizer=AdamW(0.05, schedule=lambda step: 0.5 ** ((step - 1) // 4)))
    for e in range(3):
        w = start[e].clone().requires_grad_()
        optimiser = torch.optim.AdamW([w], lr=0.05, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, 4, 0.5)
        for _ in range(9):
            optimiser.zero_grad()
            (x[e] @ w.T - goal[e]).square().sum().backward()
            optimiser.step()
            schedule.step()
        torch.testing.assert_close(ours.params["w"][e], w.detach(), atol=1e-10, rtol=1e-8)


def test_requests_share_blocks_and_blocks_run_out() -> None:
    base = lm("llama")
    requests = [FRANCE, ITALY, SPEAK]
    patch = MELO(**{**QUICK, "edits_per_block": 2, "rank": 4, "steps": 60}).edit(base, requests)
    assert [len(op.tensors["up"]) for op in patch.ops[1:]] == [2, 2] and patch.ops[0].tensors["block"].tolist() == [0, 0, 1]
    assert base.generate([r.prompt for r in requests], stacks=[(patch,)]) == ["Rome", "Spanish", "French"]
    few = MELO(**{**QUICK, "blocks": 1, "edits_per_block": 2})
    with pytest.raises(ConfigError, match="2 blocks are needed and there are 1"):
        few.edit(base, requests)
    first = few.edit(base, [FRANCE])
    with pytest.raises(ConfigError, match="2 blocks are needed and there are 1"):
        few.edit(base, [ITALY], on=(first,))


def test_continual_edits_go_on_from_the_last_patch_and_replace_it() -> None:
    base = lm("llama", torch.float64)
    editor = MELO(**QUICK)
    first = editor.edit(base, [FRANCE])
    second = editor.edit(base, [ITALY], on=(first,))
    assert second.replaces == (first.id,) and second.requests == (FRANCE, ITALY) and active_patches((first, second)) == (second,)
    assert torch.equal(second.ops[1].tensors["up"][0], first.ops[1].tensors["up"][0])
    assert base.generate([FRANCE.prompt, ITALY.prompt], stacks=[(first, second)]) == ["Rome", "Spanish"]
    assert base.generate([FRANCE.prompt, ITALY.prompt], stacks=[(first,)]) == ["Rome", "Italian"]
    joint = MELO(**{**QUICK, "edits_per_block": 1}).edit(base, [FRANCE, ITALY])  # the same, made at once
    for a, b in zip(joint.ops, second.ops, strict=True):
        for name in a.tensors:
            torch.testing.assert_close(a.tensors[name], b.tensors[name], atol=1e-6, rtol=1e-6)
    again = editor.edit(base, [EditRequest(FRANCE.prompt, "Madrid", "France")], on=(second,))  # the same fact, another answer
    assert base.generate([FRANCE.prompt, ITALY.prompt], stacks=[(again,)]) == ["Madrid", "Spanish"]
    for other in ({"rank": 3}, {"blocks": 9}, {"lora_layers": (2,)}, {"reads": "output"}):
        assert MELO(**{**QUICK, **other}).edit(base, [ITALY], on=(first,)).replaces == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patches_on_one_stack_and_rows_of_a_batch_keep_their_choices_apart(family: str) -> None:
    base = lm(family)
    a, b = MELO(**QUICK).edit_each(base, [FRANCE, ITALY])
    c = MELO(**{**QUICK, "lora_layers": (2, 3), "blocks": 9, "lr": 0.01}).edit(base, [SPEAK], on=(a, b))
    assert (
        c.replaces == ()
        and c.id == MELO(**{**QUICK, "lora_layers": (2, 3), "blocks": 9, "lr": 0.01}).edit(base, [SPEAK], on=(a, b), runner=FullForward).id
    )
    prompts = [FRANCE.prompt, ITALY.prompt, SPEAK.prompt]
    for request, own in ((FRANCE, a), (ITALY, b), (SPEAK, c)):
        batch = base.batch(base.encode([request.prompt], [request.target]))
        for stack in ((a, b, c), (c, b, a)):
            assert torch.equal(base.logits(batch, [stack]), base.logits(batch, [(own,)]))
    assert base.generate(prompts, stacks=[(a, b, c)]) == ["Rome", "Spanish", "French"]
    stacks: list[tuple[Patch, ...]] = [(), (a,), (b,), (c,), (a, b, c), (c, a)]
    rows = [(i, s) for i in range(3) for s in range(len(stacks))]
    together = base.generate([prompts[i] for i, _ in rows], stacks=stacks, rows=[s for _, s in rows])
    assert together == [base.generate([prompts[i]], stacks=[stacks[s]])[0] for i, s in rows]
    assert {together[k] for k, (i, s) in enumerate(rows) if i == 0 and a in stacks[s]} == {"Rome"}
    assert {together[k] for k, (i, s) in enumerate(rows) if i == 0 and a not in stacks[s]} == {"Paris"}


def test_large_stores_are_not_copied_for_each_row_and_say_the_same() -> None:
    base = lm("llama")
    a, b = MELO(**QUICK).edit_each(base, [FRANCE, ITALY])
    prompts = [FRANCE.prompt, ITALY.prompt, SPEAK.prompt] * 3
    stacks, rows = [(), (a,), (b,)], [0, 1, 2, 1, 2, 0, 2, 0, 1]
    batch = base.batch(base.encode(prompts))
    apart = base.logits(batch, stacks, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.core.bank.FEW", -1)
        patch.setattr("errata.core.bank.LAUNCH", {"cpu": 0})
        torch.testing.assert_close(base.logits(batch, stacks, rows), apart, atol=1e-5, rtol=1e-5)
        assert base.generate(prompts, stacks=stacks, rows=rows) == [
            base.generate([p], stacks=[stacks[r]])[0] for p, r in zip(prompts, rows, strict=True)
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 9}, "block 9 does not exist|must lie above"),
        ({"layer": 2, "lora_layers": (2,)}, "must lie above it"),
        ({"layer": 3}, "must lie above it"),
        ({"lora_layers": (7,)}, "block 7 does not exist"),
        ({"lora_layers": ()}, "at least one block"),
        ({"lora_layers": (2, 2)}, "none twice"),
        ({"lora_point": "mlp.nothing"}, "no linear 'mlp.nothing'"),
        ({"point": "block"}, "must be a linear"),
        ({"radius": -1.0}, "must not be negative"),
        ({"rank": 0}, "at least 1"),
        ({"edits_per_block": 0}, "at least 1"),
        ({"lr": 0.0}, "must be positive"),
        ({"decay": 0.0}, "decay above 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MELO(**settings).edit(lm("llama"), [FRANCE])


def test_the_rule_for_layers() -> None:
    sites = MELO().target_sites(lm("llama"))
    assert sites == (Site(1, "mlp_down"), (Site(2, "mlp_down"), Site(3, "mlp_down")))
    for preset in MELO.PRESETS.values():
        MELO(**{k: tuple(v) if isinstance(v, list) else v for k, v in preset.items()})
    with pytest.raises(ConfigError, match="at least one request"):
        MELO().edit(lm("llama"), [])
