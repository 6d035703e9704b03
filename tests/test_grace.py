"""GRACE: its rules against a plain re-implementation, its look-up at the edge of radii, its values against a plain loop."""

from __future__ import annotations

import pytest
import torch
from codebooks import text
from families import lm

from errata.core.bank import Bank, ForwardContext, active_patches
from errata.core.patch import Op, Patch, Site
from errata.core.tail import FullForward
from errata.core.tokens import Encoded
from errata.errors import ConfigError, PatchError
from errata.methods.codebook.grace import GRACE
from errata.methods.codebook.op import Codebook
from errata.methods.codebook.store import FilledCodebook, KeyedText, pack
from errata.request import EditRequest

FRANCE = EditRequest("The capital of France is", "Rome", "France")
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy")
SPAIN = EditRequest("The capital of Spain is", "Paris", "Spain")
QUICK = {"layer": 1, "eps": 0.1, "unit": "norm", "lr": 0.3, "steps": 30, "end": "."}


def plain(texts: list[KeyedText], eps: float, norm: bool, moving: bool, rounding: float) -> tuple[list, list, list]:
    """The published rules, one text after another, in Python; with ``rounding`` ours."""
    keys: list[torch.Tensor] = []
    radii: list[float] = []
    labels: list[tuple[int, ...]] = []
    for t in texts:
        q, size = t.read, float(t.read.norm())
        mine = eps * size if norm else eps
        away = [float((k - q).norm()) for k in keys]
        j = min(range(len(keys)), key=away.__getitem__, default=-1)
        if j < 0 or away[j] > mine + radii[j]:
            keys.append(q)
            radii.append(mine)
            labels.append(t.row.target)
        elif labels[j] != t.row.target:
            if rounding and away[j] <= rounding * size:
                labels[j] = t.row.target
                continue
            radii[j] = away[j] / 2 - 1e-5
            keys.append(q)
            radii.append(away[j] / 2)
            labels.append(t.row.target)
        elif away[j] > radii[j] + rounding * size:
            radii[j] = away[j]
            if moving:
                keys[j] = (keys[j] + q) / 2
    return keys, radii, labels


@pytest.mark.parametrize("expand", ["coverage", "moving_average"])
@pytest.mark.parametrize("unit", ["absolute", "norm"])
@pytest.mark.parametrize("rounding", [0.0, 0.08])
@pytest.mark.parametrize("seed", range(4))
def test_entries_are_those_of_the_rules_applied_one_by_one(seed: int, rounding: float, unit: str, expand: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    which = torch.randint(6, (120,), generator=generator)
    keys = centres[which] + 0.6 * torch.randn(120, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (120,), generator=generator).tolist()
    texts = [text(k, 7, *range(3, 3 + label)) for k, label in zip(keys, labels, strict=True)]
    eps = 1.0 if unit == "absolute" else 0.12
    book = FilledCodebook(GRACE(eps=eps, unit=unit, expand=expand), None, texts, rounding)
    want_keys, want_radii, want_labels = plain(texts, eps, unit == "norm", expand == "moving_average", rounding)
    torch.testing.assert_close(book.book.keys, torch.stack(want_keys), atol=1e-12, rtol=0)
    torch.testing.assert_close(book.radii, torch.tensor(want_radii, dtype=torch.float64), atol=1e-9, rtol=0)
    assert book.book.labels == want_labels and len(book.values) == len(want_keys)
    assert sum(book.counts.values()) == 120
    used = {k for k, n in book.counts.items() if n}
    assert {"added", "split", "joined", "expanded"} <= used and ("taken" in used) == (rounding > 0)
    # half of the stream in one patch and half in the next is the same codebook
    first = FilledCodebook(GRACE(eps=eps, unit=unit, expand=expand), None, texts[:60], rounding)
    op = Op("codebook", Site(1, "mlp_down"), {"keys": first.book.keys, "values": torch.stack(first.values), "radii": first.radii})
    before = Patch("grace", {}, "", (), (op,), {"labels": pack(first.book.labels)})
    second = FilledCodebook(GRACE(eps=eps, unit=unit, expand=expand), before, texts[60:], rounding)
    torch.testing.assert_close(second.book.keys, book.book.keys)
    torch.testing.assert_close(second.radii, book.radii)
    assert second.book.labels == book.book.labels


def test_expand_and_split_by_hand() -> None:
    line = [torch.tensor([x, 0.0], dtype=torch.float64) for x in (10.0, 11.5, 13.0, 10.0, 40.0)]
    same = [text(k, 5) for k in line]
    widened = FilledCodebook(GRACE(eps=1.0), None, same[:2], 0.0)  # 1.5 away: within 1 + 1, beyond 1
    assert widened.radii.tolist() == [1.5] and widened.counts["expanded"] == 1
    other = FilledCodebook(GRACE(eps=1.0), None, [same[0], text(line[1], 6)], 0.0)
    assert other.radii.tolist() == pytest.approx([0.75 - 1e-5, 0.75], abs=1e-12) and other.counts["split"] == 1
    apart = FilledCodebook(GRACE(eps=1.0), None, [same[0], same[2]], 0.0)  # 3 away
    assert apart.radii.tolist() == [1.0, 1.0] and apart.counts["added"] == 2
    moved = FilledCodebook(GRACE(eps=1.0, expand="moving_average"), None, same[:2], 0.0)
    assert moved.book.keys.tolist() == [[10.75, 0.0]] and moved.radii.tolist() == [1.5]
    # the same prompt with another answer: ours takes the entry over, as published neither is hit again
    ours = FilledCodebook(GRACE(eps=1.0), None, [same[0], text(line[3], 6)], 1e-6)
    assert ours.radii.tolist() == [1.0] and ours.book.labels == [(6,)] and ours.counts["taken"] == 1 and ours.lost == 1
    published = FilledCodebook(GRACE(eps=1.0), None, [same[0], text(line[3], 6)], 0.0)
    assert published.radii.tolist() == [-1e-5, 0.0] and published.lost == 2


def test_a_text_trains_the_entry_it_hits_in_the_end() -> None:
    """b joins a; c, of another label, then comes between them, so b gets c's answer and trains nothing."""
    a, b, c = (torch.tensor([x, 0.0], dtype=torch.float64) for x in (0.0, 0.9, 1.0))
    texts = [text(a, 5), text(b, 5), text(c, 6)]
    book = FilledCodebook(GRACE(eps=1.0), None, texts, 0.0)
    assert book.book.labels == [(5,), (6,)]
    assert {entry: len(rows) for entry, rows in book.trains.items()} == {0: 1, 1: 1}
    assert book.trains[1][0] is texts[2] and book.lost == 1
    both = FilledCodebook(GRACE(eps=1.0), None, texts[:2], 0.0)
    assert [len(rows) for rows in both.trains.values()] == [2] and both.lost == 0


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_an_empty_memory_or_none_hit_is_the_identity_bit_for_bit(count: int, replace: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 5, 6, generator=generator).to(torch.bfloat16)
    p = {"keys": 100 + torch.randn(1, count, 8), "values": torch.randn(1, count, 6), "radii": torch.ones(1, count)}
    context = ForwardContext(torch.arange(5).expand(3, 5), torch.tensor([5, 4, 3]), {})
    settings = {"replace": replace, "rounding": 1e-6}
    assert torch.equal(Codebook.apply(p, settings, x, y, Site(0, "mlp_down"), context), y)
    assert (context.recorded[Site(0, "mlp_down"), "entry"] == -1).all()
    if count:  # and one that is hit is not
        p["keys"][0, 0] = x[1, 3]
        out = Codebook.apply(p, settings, x, y, Site(0, "mlp_down"), context)
        where = {"last": [3], "prompt": [0, 1, 2], "all": [0, 1, 2, 3, 4]}[replace]
        noted = context.recorded[Site(0, "mlp_down"), "entry"]
        assert [t for t in range(5) if noted[1, t] == 0] == where and (noted[[0, 2]] == -1).all()
        for t in range(5):
            assert torch.equal(out[1, t], p["values"][0, 0].to(y.dtype) if t in where else y[1, t])
        assert torch.equal(out[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
@pytest.mark.parametrize("value", ["cold", "warm"])
def test_training_is_a_plain_loop_of_adam(replace: str, value: str) -> None:
    base = lm("llama", torch.float64)
    editor = GRACE(layer=1, eps=0.1, unit="norm", lr=0.05, steps=12, end=".", replace=replace, value=value)
    for request, patch in zip((FRANCE, ITALY), editor.edit_each(base, [FRANCE, ITALY]), strict=True):
        (row,) = base.encode([request.prompt], [request.target + "."])
        end = row.prompt_length - 1
        where = {"last": slice(end, end + 1), "prompt": slice(0, end), "all": slice(None)}[replace]
        seen = {}
        module = base.blocks[1].mlp.down_proj
        handle = module.register_forward_hook(lambda _, a, o, seen=seen: seen.update(x=a[0][0, -1], y=o[0, -1]))
        base.hf(input_ids=torch.tensor([row.ids[: end + 1]]))
        handle.remove()
        torch.testing.assert_close(patch.ops[0].tensors["keys"][0], seen["x"])
        start = torch.rand(32, generator=torch.Generator().manual_seed(0)).double() if value == "cold" else seen["y"]
        v = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([v], lr=0.05)

        def put(_, __, o, v=v, where=where):  # type: ignore[no-untyped-def]
            o = o.clone()
            o[0, where] = v
            return o

        labels = torch.tensor([row.ids]).masked_fill(torch.arange(len(row.ids)) < row.prompt_length, -100)
        handle = module.register_forward_hook(put)
        for _ in range(12):
            optimiser.zero_grad()
            base.hf(input_ids=torch.tensor([row.ids]), labels=labels).loss.backward()
            optimiser.step()
        handle.remove()
        torch.testing.assert_close(patch.ops[0].tensors["values"][0], v.detach(), atol=1e-6, rtol=1e-5)
        assert float((v.detach() - start).abs().max()) > 0.2


@pytest.mark.parametrize("replace", ["last", "prompt", "all"])
def test_a_joint_edit_is_the_edits_one_after_another(replace: str) -> None:
    """Entries that do not meet: in one patch or in three, the codebook is the same and holds every answer."""
    base = lm("llama", torch.float64)
    editor = GRACE(**{**QUICK, "replace": replace})
    requests = [FRANCE, ITALY, SPAIN]
    joint = editor.edit(base, requests)
    stack: tuple[Patch, ...] = ()
    for request in requests:
        stack = (*stack, editor.edit(base, [request], on=stack))
    assert active_patches(stack) == (stack[-1],) and stack[-1].requests == tuple(requests)
    for name, tensor in joint.ops[0].tensors.items():
        assert len(tensor) == 3
        torch.testing.assert_close(stack[-1].ops[0].tensors[name], tensor, atol=1e-6, rtol=1e-6)
    assert torch.equal(stack[-1].state["labels"], joint.state["labels"])
    if replace != "prompt":  # earlier tokens of these prompts alone do not carry the answer
        assert [said.split()[0] for said in base.generate([r.prompt for r in requests], stacks=[(joint,)])] == ["Rome", "Spanish", "Paris"]
    assert base.generate([SPAIN.prompt], stacks=[stack[:2]]) == ["Madrid"]  # the last edit taken back


def test_the_same_fact_edited_again_and_a_codebook_elsewhere() -> None:
    base = lm("llama")
    editor = GRACE(**QUICK)
    first = editor.edit(base, [FRANCE])
    again = editor.edit(base, [EditRequest(FRANCE.prompt, "Madrid", "France")], on=(first,))
    assert again.replaces == (first.id,) and again.notes["taken"] == 1 and len(again.ops[0].tensors["radii"]) == 1
    with base.under(again):
        assert base.complete(FRANCE.prompt).startswith("M")
    more = editor.edit(base, [FRANCE], on=(first,))  # nothing new: the same entry trains on
    assert more.notes["joined"] == 1 and more.notes["loss"] < first.notes["loss"]
    for other in (GRACE(**{**QUICK, "layer": 2}), GRACE(**{**QUICK, "replace": "all"})):
        fresh = other.edit(base, [ITALY], on=(first,))
        assert fresh.replaces == () and len(fresh.ops[0].tensors["radii"]) == 1


def test_paraphrases_are_entries_or_rows_of_the_same_entry() -> None:
    base = lm("llama")
    request = EditRequest(SPAIN.prompt, SPAIN.target, "Spain", paraphrases=("Spain has the capital", "The capital of Spain is"))
    patch = GRACE(**{**QUICK, "stop": 0.5, "steps": 60}).edit(base, [request])
    assert patch.notes["added"] == 2 and patch.notes["joined"] == 1
    with base.under(patch):
        assert [base.complete(p).split()[0] for p in ("Spain has the capital", SPAIN.prompt)] == ["Paris", "Paris"]
    assert patch.notes["steps"] < 60 and patch.notes["loss"] < 0.5


def ask(base, prompts, stacks, rows=None):  # type: ignore[no-untyped-def]
    return base.generate(prompts, stacks=stacks, rows=rows, max_new_tokens=3, stop=())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("replace", ["prompt", "all"])
def test_decisions_last_over_decoding(replace: str, family: str) -> None:
    """What looks ahead and what goes on after the prompt: cached, uncached, padded and raw calls agree; rows keep to their patches."""
    base = lm(family)
    settings = {**QUICK, "replace": replace}
    a, b = GRACE(**settings).edit_each(base, [FRANCE, ITALY])
    both = GRACE(**settings).edit(base, [ITALY, FRANCE])
    prompts = [FRANCE.prompt, "In Rome people speak", ITALY.prompt, FRANCE.prompt, ITALY.prompt, FRANCE.prompt]
    stacks = [(a,), (b,), (both,), ()]
    rows = [0, 0, 1, 2, 2, 3]
    together = ask(base, prompts, stacks, rows)
    assert together == [ask(base, [p], [stacks[r]])[0] for p, r in zip(prompts, rows, strict=True)]
    if replace == "all":
        assert together[0].startswith("Rome") and together[3].startswith("Rome") and together[5].startswith("Paris")
    batch = base.batch(base.encode([FRANCE.prompt]))
    assert not torch.equal(base.logits(batch, [(a,)]), base.logits(batch, [()]))
    for i in (0, 2, 3):
        ids = list(base.encode([prompts[i]])[0].ids)
        size = len(ids)
        for _ in range(3):
            batch = base.batch([Encoded(tuple(ids), size), Encoded(tuple(range(3, 14)), 11)], "right" if i else "left")
            last = len(ids) - 1 if i else -1
            ids.append(int(base.logits(batch, [stacks[rows[i]]], [0, 0])[0, last].argmax()))
        assert base.tokenizer.decode(ids[size:], skip_special_tokens=True).strip() == together[i]
    with base.under(a):
        encoded = base.encode(prompts[:2])
        batch = base.batch(encoded)
        out = base.hf.generate(input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=3, do_sample=False)
        said = [base.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, batch.ids.shape[1] :]]
        assert said == together[:2]


def test_two_codebooks_on_a_stack_keep_their_decisions_apart() -> None:
    """The one knows France, the other, higher up, Italy: on each prompt the one that does not know it changes nothing."""
    base = lm("llama")
    a = GRACE(**{**QUICK, "replace": "all"}).edit(base, [FRANCE])
    b = GRACE(**{**QUICK, "replace": "all", "layer": 2}).edit(base, [ITALY])
    for request, own in ((FRANCE, a), (ITALY, b)):
        for stack in ((a, b), (b, a)):
            alone, stacked = ask(base, [request.prompt], [(own,)]), ask(base, [request.prompt], [stack])
            assert alone == stacked
            batch = base.batch(base.encode([request.prompt], [request.target]))
            assert torch.equal(base.logits(batch, [stack]), base.logits(batch, [(own,)]))
            assert not torch.equal(base.logits(batch, [stack]), base.logits(batch, [()]))
    c = GRACE(**{**QUICK, "replace": "all", "layer": 3}).edit(base, [SPAIN], on=(a, b))  # training under both, by whole passes
    whole = GRACE(**{**QUICK, "replace": "all", "layer": 3}).edit(base, [SPAIN], on=(a, b), runner=FullForward)
    assert c.id == whole.id


def test_a_shared_book_is_not_copied_for_each_row_and_says_the_same() -> None:
    """Stacks with books too large to copy a row are looked up by entry; books of a row each in one go; both are one patch at a time."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, 8, generator=generator), torch.randn(12, 4, 6, generator=generator)
    keys = torch.randn(3, 40, 8, generator=generator)
    keys[0, 7], keys[1, 9] = x[2, 3], x[5, 3]
    p = {"keys": keys, "values": torch.randn(3, 40, 6, generator=generator), "radii": torch.full((3, 40), 1e-3)}
    rows = torch.tensor([0, 1, 0, -1, 2, 1, 0, 2, 2, 1, 0, -1])
    for replace in ("last", "all"):
        context = ForwardContext(torch.arange(4).expand(12, 4), torch.full((12,), 4), None, True, {}, None, 12)
        settings = {"replace": replace, "rounding": 0.0}
        bank = Bank("codebook", Site(0, "mlp_down"), settings, p, rows)
        gathered = bank.apply(x, y, context)
        by_entry = Codebook.apply_grouped(p, bank.groups, settings, x, y, Site(0, "mlp_down"), context)
        assert torch.equal(gathered, by_entry)
        changed = (gathered != y).any(-1)
        assert changed.any(1).nonzero()[:, 0].tolist() == [2, 5] and changed[2].tolist() == (
            [False] * 3 if replace == "last" else [True] * 3
        ) + [True]


def test_a_text_begun_without_the_patch_is_one_clear_error() -> None:
    base = lm("llama")
    patch = GRACE(**{**QUICK, "replace": "all"}).edit(base, [FRANCE])
    ids = torch.tensor([base.encode([FRANCE.prompt])[0].ids])
    cache = base.hf(input_ids=ids, use_cache=True).past_key_values
    with base.under(patch), pytest.raises(PatchError, match="before the patch was on"):
        base.hf(input_ids=ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 9}, "block 9 does not exist"),
        ({"point": "mlp.nothing"}, "no linear 'mlp.nothing'"),
        ({"point": "block"}, "must be a linear"),
        ({"layer": 3, "replace": "prompt"}, "nothing reads earlier tokens of the last block"),
        ({"eps": -1.0}, "must not be negative"),
        ({"rounding": -1.0}, "must not be negative"),
        ({"lr": 0.0}, "must be positive"),
        ({"steps": 0}, "at least 1"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRACE(**settings).edit(lm("llama"), [FRANCE])
    with pytest.raises(ConfigError, match="at least one request"):
        GRACE().edit(lm("llama"), [])


def test_default_layers_and_presets() -> None:
    assert GRACE().target_site(lm("llama")).block == 2  # never the last of four
    for name, preset in GRACE.PRESETS.items():
        GRACE(**preset)
        assert preset["layer"] >= 0, name
