"""Fine-tuning editors against plain loops: full forwards, a cloned weight, torch's own Adam, in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from families import lm
from torch import Tensor

from errata.config import build
from errata.core.families import resolve
from errata.core.model import LM
from errata.core.patch import Patch
from errata.core.tail import Tail
from errata.core.tokens import Encoded
from errata.core.weights import delta_weight
from errata.errors import ConfigError
from errata.methods.finetune import editor as finetune_editor
from errata.methods.finetune import training as finetune_training
from errata.methods.finetune.editor import FineTuneEditor
from errata.methods.finetune.ft import FTL, FTM, LocFT
from errata.methods.finetune.training import DenseTraining
from errata.request import EditRequest

REQUESTS = [
    EditRequest("The capital of France is", "Tokyo", "France"),  # targets of several tokens, and of one
    EditRequest("The language of Italy is", "Spanish", "Italy"),
    EditRequest("In Rome people speak", "French", "Rome"),
    EditRequest("The capital of Japan is", "Madrid", "Japan"),
    EditRequest("The language of Spain is", "Italian", "Spain"),
]
SHARED = {"layers": [1], "lr": 5e-3, "steps": 6}
TIGHT = {"atol": 1e-7, "rtol": 0.0}
families = pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's linears are Conv1D
RowLoss = Callable[[Tensor, Encoded], Tensor]  # (logits [T, V] of the whole text, its ids) -> the loss of the row


@functools.cache
def base(family: str) -> LM:
    return lm(family, torch.float64)


def make(cls: type[FineTuneEditor], **more: object) -> FineTuneEditor:
    return build(cls, {**SHARED, **more})


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
    modules = {b: resolve(model.blocks[b], model.family.mlp_down) for b in editor.target_layers(model)}
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


def encoded(family: str, requests: Sequence[EditRequest], end: str = "") -> list[Encoded]:
    return base(family).encode([r.prompt for r in requests], [r.target + end for r in requests])


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


def test_loc_ft_teaches_the_answer_and_its_end() -> None:
    """These models never saw an EOS, and generation goes on until one or a stop text: the free text ends where the target does."""
    model = base("llama")
    patch = make(LocFT, steps=60, lr=0.03, layers=[0, 1, 2, 3]).edit(model, REQUESTS[:3])
    with model.under(patch):
        assert [model.complete(r.prompt, stop=()) for r in REQUESTS[:3]] == [r.target for r in REQUESTS[:3]]


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


def test_prompt_last_is_the_formula_and_sees_no_target() -> None:
    """−1/m Σ log p(o_t | prompt); the rows hold the prompt alone, so the order of the target's tokens cannot matter."""
    model = base("llama")
    job = DenseTraining(make(FTL), model, [[REQUESTS[0]]], (), Tail)
    zero = {"1": torch.zeros((1, model.width, 64), dtype=torch.float64, requires_grad=True)}
    loss, rows = job._loss(zero, torch.tensor([0]), number=0, batch=0)
    row = encoded("llama", REQUESTS[:1])[0]
    assert len(row.target) > 1 and rows.tolist() == [1]
    log_p = model.logits(model.batch([Encoded(row.ids[: row.prompt_length], row.prompt_length)]))[0, -1].log_softmax(-1)
    torch.testing.assert_close(loss[0], -log_p[list(row.target)].mean(), atol=1e-12, rtol=0)
    assert job.objective.rows.active.tolist() == [list(row.ids[: row.prompt_length])]
    (gradient,) = torch.autograd.grad(loss.sum(), [zero["1"]])
    job.objective.ids = job.objective.ids.flip(1)  # type: ignore[attr-defined]
    (turned,) = torch.autograd.grad(job._loss(zero, torch.tensor([0]), number=0, batch=0)[0].sum(), [zero["1"]])
    torch.testing.assert_close(turned, gradient, atol=1e-12, rtol=0)
    assert float(gradient.abs().max()) > 0


def test_a_target_of_several_tokens_is_beyond_ft_l() -> None:
    """Its loss cannot fall below the entropy of the target's own tokens, and the model says one of them again and again."""
    model = base("llama")
    request = REQUESTS[0]
    row = encoded("llama", [request])[0]
    counts = torch.tensor([row.target.count(o) / len(row.target) for o in set(row.target)])
    floor = float(-(counts * counts.log()).sum())
    settings = {"steps": 60, "lr": 0.02, "layers": [1, 2]}
    last, new = (make(cls, **settings).edit(model, [request]) for cls in (FTL, FTM))
    assert floor > 0.5 and floor - 1e-6 < last.notes["loss"] < floor + 0.15 and new.notes["loss"] < 0.05
    said = {}
    for name, patch in (("last", last), ("new", new)):
        with model.under(patch):
            said[name] = model.complete(request.prompt)
    assert said["new"].startswith("Tokyo") and not said["last"].startswith("Tokyo")


def test_targets_tokenised_alone_bring_the_bos() -> None:
    """The released code's fault, on request."""
    model = base("llama")
    job = DenseTraining(make(FTL, target_ids="alone"), model, [[REQUESTS[1]]], (), Tail)
    assert job.objective.ids.tolist() == [model.tokenizer(" Spanish")["input_ids"]]  # type: ignore[attr-defined]
    assert job.objective.ids[0, 0] == model.tokenizer.bos_token_id  # type: ignore[attr-defined]
    joint = DenseTraining(make(FTL), model, [[REQUESTS[1]]], (), Tail)
    assert joint.objective.ids.tolist() == [list(encoded("llama", REQUESTS[1:2])[0].target)]  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_truncation_reports_what_it_lost(layers: list[int]) -> None:
    """The best approximation of its rank, and the notes say by how much it is off."""
    model = base("llama")
    whole = make(FTM, layers=layers).edit(model, REQUESTS)
    for rank in (1, 3, model.width):
        cut = make(FTM, layers=layers, rank=rank).edit(model, REQUESTS)
        off = [delta_weight(a) - delta_weight(b) for a, b in zip(whole.ops, cut.ops, strict=True)]
        assert all(op.kind == "low_rank" and op.tensors["down"].shape[0] == rank for op in cut.ops)
        lost = torch.stack([d.square().sum() for d in off]).sum().sqrt()
        size = torch.stack([delta_weight(op).square().sum() for op in whole.ops]).sum().sqrt()
        assert cut.notes["lost_norm"] == pytest.approx(float(lost), abs=1e-9)
        assert cut.notes["lost_share"] == pytest.approx(float(lost / size), abs=1e-9)
        for d, op in zip(off, whole.ops, strict=True):  # Eckart–Young
            best = torch.linalg.svdvals(delta_weight(op))[rank:].square().sum().sqrt()
            torch.testing.assert_close(d.square().sum().sqrt(), best, atol=1e-9, rtol=0)
    assert 0 < make(FTM, layers=layers, rank=1).edit(model, REQUESTS).notes["lost_share"] < 1 and "lost_norm" not in whole.notes


def test_truncating_an_edit_that_had_nothing_to_do() -> None:
    model = base("llama")
    patch = make(FTM, rank=2, stop=0.9).edit(model, [EditRequest("The capital of France is", "Paris")])
    assert patch.notes["steps"] == 0 and patch.notes["lost_norm"] == patch.notes["lost_share"] == 0.0
    batch = model.batch(encoded("llama", REQUESTS))
    assert torch.equal(model.logits(batch, [(patch,)]), model.logits(batch))


def test_half_precision_bases_train_in_float32() -> None:
    model = lm("llama", torch.bfloat16)
    patch = make(FTM, lr=0.01, steps=40, end=".").edit(model, REQUESTS[:2])
    assert patch.ops[0].tensors["weight"].dtype == torch.float32
    with model.under(patch):
        assert [model.complete(r.prompt) for r in REQUESTS[:2]] == ["Tokyo", "Spanish"]


@pytest.mark.parametrize(("cls", "settings", "message"), [
    (FTM, {"steps": 0}, "at least 1"), (FTM, {"batch_size": 0}, "at least 1"), (FTM, {"rank": 0}, "at least 1"),
    (FTM, {"lr": 0.0}, "must be positive"), (FTL, {"norm_constraint": 0.0}, "must be positive"),
    (FTL, {"stop": -1.0}, "must not be negative"),
    (FTL, {"layers": []}, "at least one block"), (FTL, {"layers": [1, 1]}, "none twice"), (LocFT, {"seed": -1}, "seed must be"),
    (FTL, {"end": "."}, "no setting 'end'"), (FTL, {"target_ids": "both"}, "one of joint, alone"), (FTM, {"eos": True}, "no setting 'eos'"),
])  # fmt: skip
def test_bad_settings(cls: type[FineTuneEditor], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(cls, **settings)


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 33}, "rank 33 exceeds"),
    ({"layers": [4]}, r"block 4 does not exist \(0 to 3\)"), ({"layers": [-1]}, "block -1 does not exist"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_model(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(FTM, **settings).edit(base("llama"), REQUESTS[:1])


def test_nothing_to_edit_and_no_eos() -> None:
    with pytest.raises(ConfigError, match="give at least one request"):
        make(FTM).edit(base("llama"), [])
    model = lm("llama", torch.float64)
    other = type(model.tokenizer)(tokenizer_object=model.tokenizer.backend_tokenizer, bos_token="<s>", pad_token="<pad>")
    without = LM(model.hf, other, "llama")
    with pytest.raises(ConfigError, match="no EOS; set eos=false"):
        make(LocFT).edit(without, REQUESTS[:1])
    assert make(LocFT, eos=False, steps=1).edit(without, REQUESTS[:1]).notes["steps"] == 1


def test_presets_and_the_rule_for_other_models() -> None:
    named = lm("llama")
    named.name = "some-org/Mistral-7B-v0.1"
    assert FTL.for_model(named).norm_constraint == 5e-5 and FTL.for_model(named).layers == (21,)
    assert LocFT.for_model(named).lr == 5e-5 and LocFT.for_model(named, lr=1e-3).lr == 1e-3
    assert FTM().target_layers(named) == (3,) and FTM().num_parameters(named) == 32 * 64  # 21/32 of four blocks
