"""What the fine-tuning editors have of their own: the end LocFT learns, FT-L's objective, the rank a change is cut to, presets,
and the settings they refuse."""

from __future__ import annotations

import pytest
import torch
from families import lm
from finetuning import REQUESTS, base, encoded, make

from errata.core.model import LM
from errata.core.tail import Tail
from errata.core.tokens import Encoded
from errata.core.weights import delta_weight
from errata.errors import ConfigError
from errata.methods.finetune.editor import FineTuneEditor
from errata.methods.finetune.ft import FTL, FTM, LocFT
from errata.methods.finetune.training import DenseTraining
from errata.request import EditRequest


def test_loc_ft_teaches_the_answer_and_its_end() -> None:
    """These models never saw an EOS, and generation goes on until one or a stop text: the free text ends where the target does."""
    model = base("llama")
    patch = make(LocFT, steps=60, lr=0.03, layers=[0, 1, 2, 3]).edit(model, REQUESTS[:3])
    with model.under(patch):
        assert [model.complete(r.prompt, stop=()) for r in REQUESTS[:3]] == [r.target for r in REQUESTS[:3]]


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
    assert FTM().target_layers(named) == (1,) and FTM().num_parameters(named) == 32 * 64  # 6/32 of four blocks
    assert FTM.for_model(named, preset="published").layers == (21,) and FTM.for_model(named).layers is None
    named.name = "unheard-of"
    assert FTM.for_model(named, preset="published").target_layers(named) == FTL().target_layers(named) == (3,)  # 21/32
