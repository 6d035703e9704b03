"""Fine-tuning editors against plain loops: full forwards, a cloned weight, torch's own Adam, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from families import lm
from finetuning import REQUESTS, TIGHT, base, encoded, families, make
from torch import Tensor

from errata.core.model import LM
from errata.core.patch import Patch, Site
from errata.core.tail import Tail
from errata.core.tokens import Encoded
from errata.core.weights import delta_weight
from errata.methods.finetune import editor as finetune_editor
from errata.methods.finetune import training as finetune_training
from errata.methods.finetune.editor import FineTuneEditor
from errata.methods.finetune.ft import FTL, FTM, LocFT
from errata.methods.finetune.training import DenseTraining

RowLoss = Callable[[Tensor, Encoded], Tensor]  # (logits [T, V] of the whole text, its ids) -> the loss of the row


def target_new(logits: Tensor, row: Encoded) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -torch.stack([log_p[row.prompt_length - 1 + t, o] for t, o in enumerate(row.target)]).mean()


def prompt_last(logits: Tensor, row: Encoded) -> Tensor:
    log_p = logits[row.prompt_length - 1].log_softmax(-1)
    return -sum(log_p[o] for o in row.target) / len(row.target)


def plain(
    family: str, editor: FineTuneEditor, rows: Sequence[Encoded], loss: RowLoss, start: dict[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """W − W_0 [O, I] of each trained block, by a loop that knows nothing of patches; ``start``: what W_0 has on top of the base."""
    model = lm(family, torch.float64)
    modules = {b: model.module(Site(b, "mlp_down")) for b in editor.target_layers(model)}
    turned = {b: type(m).__name__ == "Conv1D" for b, m in modules.items()}
    for b, change in (start or {}).items():
        modules[b].weight.data += change.T if turned[b] else change
    before = {b: m.weight.detach().clone() for b, m in modules.items()}
    weights = [m.weight.requires_grad_(True) for m in modules.values()]
    optimiser = torch.optim.Adam(weights, editor.lr)
    for number in range(editor.steps):
        losses: list[float] = []
        for members in orders(editor, len(rows), number):
            value = torch.stack([loss(model.hf(input_ids=torch.tensor([rows[i].ids])).logits[0], rows[i]) for i in members]).mean()
            losses += [value.item()] * len(members)
            if value.item() < editor.stop:
                continue
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            if editor.norm_constraint is not None:
                for b, m in modules.items():
                    bound = editor.norm_constraint
                    m.weight.data = torch.minimum(torch.maximum(m.weight.data, before[b] - bound), before[b] + bound)
        if sum(losses) / len(losses) < editor.stop:
            break
    changes = {b: m.weight.detach() - before[b] for b, m in modules.items()}
    return {b: c.T if turned[b] else c for b, c in changes.items()}


def orders(editor: FineTuneEditor, count: int, number: int) -> list[list[int]]:
    """The mini-batches of a pass."""
    places = list(range(count))
    if editor.shuffle:
        places = torch.randperm(count, generator=torch.Generator().manual_seed(editor.seed * 2**20 + number)).tolist()
    batches = [[i for i in range(count) if places[i] // editor.batch_size == b] for b in range(-(-count // editor.batch_size))]
    return [b for b in batches if b]


def same(patch: Patch, changes: dict[int, Tensor]) -> None:
    assert [op.site.block for op in patch.ops] == list(changes)
    for op in patch.ops:
        assert float(changes[op.site.block].abs().max()) > 1e-3
        torch.testing.assert_close(delta_weight(op), changes[op.site.block], **TIGHT)


@families
@pytest.mark.parametrize(("cls", "loss"), [(FTM, target_new), (FTL, prompt_last)])
def test_equals_a_plain_loop(family: str, cls: type[FineTuneEditor], loss: RowLoss) -> None:
    for request in REQUESTS[:2]:
        patch = make(cls).edit(base(family), [request])
        same(patch, plain(family, make(cls), encoded(family, [request]), loss))


@families
def test_ends_are_trained(family: str) -> None:
    full_stop = make(FTM, end=".").edit(base(family), REQUESTS[:1])
    same(full_stop, plain(family, make(FTM), encoded(family, REQUESTS[:1], "."), target_new))
    eos = base(family).tokenizer.eos_token_id
    rows = [Encoded((*e.ids, eos), e.prompt_length) for e in encoded(family, REQUESTS[:3])]
    editor = make(LocFT, batch_size=2)
    same(editor.edit(base(family), REQUESTS[:3]), plain(family, editor, rows, target_new))


@families
@pytest.mark.parametrize(("cls", "loss", "more"), [
    (FTM, target_new, {"batch_size": 2}), (FTM, target_new, {"batch_size": 1, "layers": [0, 2]}), (FTL, prompt_last, {"batch_size": 3}),
    (FTM, target_new, {"batch_size": 2, "shuffle": True, "seed": 3}), (FTM, target_new, {"batch_size": 10}),
    (FTM, target_new, {"batch_size": 1, "stop": 0.7, "lr": 0.02, "steps": 12}),  # updates are left out, and the end comes early
])  # fmt: skip
def test_mini_batches_equal_a_plain_loop(family: str, cls: type[FineTuneEditor], loss: RowLoss, more: dict[str, object]) -> None:
    editor = make(cls, **more)
    patch = editor.edit(base(family), REQUESTS)
    same(patch, plain(family, editor, encoded(family, REQUESTS), loss))
    most = editor.steps * -(-len(REQUESTS) // editor.batch_size)
    assert patch.notes["steps"] < most if "stop" in more else patch.notes["steps"] == most


def test_shuffling_matters_and_hangs_on_the_seed() -> None:
    model = base("llama")
    how = ((False, 0), (True, 0), (True, 1))
    ids = [make(FTM, batch_size=2, shuffle=s, seed=n).edit(model, REQUESTS).ops[0].tensors["weight"] for s, n in how]
    assert not any(torch.allclose(a, b, atol=1e-6) for a, b in ((ids[0], ids[1]), (ids[1], ids[2])))
    again = make(FTM, batch_size=2, shuffle=True, seed=1).edit(model, REQUESTS)
    assert torch.equal(again.ops[0].tensors["weight"], ids[2])


def test_many_rows_in_many_problems_train_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of one to three rows in mini-batches of two: some sit a mini-batch out, some end before others; with and without copies."""
    model = base("llama")
    more = ("France has the capital", "The seat of France is")
    requests = [dataclasses.replace(r, paraphrases=more[:i]) for i, r in enumerate(REQUESTS[:3])]
    editor = make(FTM, batch_size=2, stop=0.3, lr=0.02, steps=15)
    alone = [editor.edit(model, [r]) for r in requests]
    assert len({p.notes["steps"] for p in alone}) == 3
    for few in (0, 10**9):
        monkeypatch.setattr("errata.core.bank.FEW", few)
        monkeypatch.setattr("errata.core.bank.LAUNCH", {"cpu": 0})
        for a, b in zip(alone, editor.edit_each(model, requests), strict=True):
            torch.testing.assert_close(b.ops[0].tensors["weight"], a.ops[0].tensors["weight"], **TIGHT)
            assert a.notes["steps"] == b.notes["steps"]


def test_states_made_anew_give_the_same_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than are kept: every mini-batch runs its frozen part again."""
    editor = make(FTM, batch_size=2)
    kept = editor.edit(base("llama"), REQUESTS)
    made: list[int] = []

    class Counting(Tail):
        def __init__(self, model: LM, rows: object, *more: object) -> None:
            made.append(len(rows.active))  # type: ignore[attr-defined]
            super().__init__(model, rows, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune_training, "TOKENS_KEPT", 1)
    anew = editor.edit(base("llama"), REQUESTS, runner=Counting)
    assert made == [2, 2, 1] * editor.steps
    torch.testing.assert_close(anew.ops[0].tensors["weight"], kept.ops[0].tensors["weight"], **TIGHT)


def test_the_number_trained_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By entries of ΔW, at least one problem; what comes out is the same."""
    model, editor, seen = base("llama"), make(FTM), []
    entries = editor.num_parameters(model)
    whole = editor.edit_each(model, REQUESTS)
    run = DenseTraining.run

    def watched(self: DenseTraining, progress: object = None) -> list[Patch]:
        seen.append(len(self.problems))
        return run(self, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(DenseTraining, "run", watched)
    for limit, largest in ((2 * entries + 1, 2), (1, 1)):
        seen.clear()
        monkeypatch.setattr(finetune_editor, "NUMBERS_AT_ONCE", limit)
        parts = editor.edit_each(model, REQUESTS)
        assert max(seen) == largest and sum(seen) == len(REQUESTS)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a.ops[0].tensors["weight"], b.ops[0].tensors["weight"], **TIGHT)
    assert editor.edit_each(model, []) == []


@families
def test_the_clamp_holds_exactly_and_at_every_step(family: str) -> None:
    bound = 2e-3
    editor = make(FTM, norm_constraint=bound, batch_size=2)
    patch = editor.edit(base(family), REQUESTS)
    change = delta_weight(patch.ops[0])
    assert float(change.abs().max()) == bound and float((change.abs() == bound).double().mean()) > 0.1
    same(patch, plain(family, editor, encoded(family, REQUESTS), target_new))


def test_the_clamp_counts_from_the_weights_at_the_start_of_this_edit() -> None:
    model, bound = base("llama"), 2e-3
    editor = make(FTM, norm_constraint=bound)
    first = editor.edit(model, REQUESTS[:1])
    second = editor.edit(model, REQUESTS[:1], on=(first,))
    assert float(delta_weight(second.ops[0]).abs().max()) == bound
    assert float((delta_weight(first.ops[0]) + delta_weight(second.ops[0])).abs().max()) > 1.5 * bound


@families
def test_continual_editing_is_training_on(family: str) -> None:
    """Each patch is its own edit's share of the weights: together they are the sequential run, and each comes off by itself."""
    editor = make(FTM)
    first = editor.edit(base(family), REQUESTS[:1])
    second = editor.edit(base(family), REQUESTS[2:3], on=(first,))
    assert not second.replaces
    one = plain(family, editor, encoded(family, REQUESTS[:1]), target_new)
    two = plain(family, editor, encoded(family, REQUESTS[2:3]), target_new, start=one)
    same(second, two)
    torch.testing.assert_close(delta_weight(first.ops[0]) + delta_weight(second.ops[0]), one[1] + two[1], **TIGHT)
    each = editor.edit_each(base(family), REQUESTS[2:3], on=(first,))[0]
    torch.testing.assert_close(delta_weight(each.ops[0]), delta_weight(second.ops[0]), **TIGHT)
