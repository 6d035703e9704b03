"""LoRA and AdaLoRA against PEFT's own layers, loss and rank allocator, from equal first values, in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import lm
from made import logits, raw, same
from test_lora import BOTH, CLOSE, FRANCE, ITALY, changes, editor
from torch import Tensor

from errata.core.patch import Site
from errata.core.tail import Tail
from errata.methods.adapters.allocation import RankAllocator
from errata.methods.adapters.op import DropoutMask
from errata.methods.adapters.training import Training, generator_of
from errata.request import EditRequest


class Peft:
    """A float64 base with PEFT's own layers on it, which start from errata's first values."""

    def __init__(self, e: Any, family: str) -> None:
        import peft

        self.e, self.base = e, lm(family, torch.float64)
        fused = family == "gpt2"
        common: dict[str, Any] = {
            "target_modules": ["c_attn"] if fused else ["q_proj", "v_proj"], "lora_alpha": e.alpha, "fan_in_fan_out": fused,
            "lora_dropout": e.dropout, "task_type": "CAUSAL_LM",
        }  # fmt: skip
        if e.name == "lora":
            config = peft.LoraConfig(r=e.rank, **common)
        else:
            config = peft.AdaLoraConfig(
                init_r=e.rank, target_r=e.target_rank, total_step=e.steps, tinit=e.t_init, tfinal=e.t_final, deltaT=e.delta_t,
                beta1=e.beta1, beta2=e.beta2, orth_reg_weight=e.orthogonal, **common,
            )  # fmt: skip
        with warnings.catch_warnings():  # PEFT asks transformers by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self.model = peft.get_peft_model(lm(family, torch.float64).hf, config).double().train()
        self.hf = self.model.get_base_model()
        for name, p in self.model.named_parameters():
            if ".ranknum." in name:
                p.requires_grad_(False)  # a constant; PEFT 0.21 makes it trainable where the base is not float32
        self.hf.loss_function = in_float64  # transformers' own goes through float32
        self.layers = {}
        for site, (inner, outer) in e.shapes(self.base).items():
            layer = self.model.get_submodule(f"base_model.model.{self.base.family.blocks}.{site.block}.{site.point}")
            self.layers[site] = layer
            for name, value in start(e, site, inner, outer).items():
                self.parameter(site, name).data.copy_(value)

    def parameter(self, site: Site, name: str) -> Tensor:
        found = getattr(self.layers[site], f"lora_{name}")["default"]
        return found if isinstance(found, Tensor) else found.weight

    def put(self, step: int) -> None:
        """errata's masks of this step in place of PEFT's dropout."""

        class Masked(torch.nn.Module):
            def __init__(self, site: Site, drop: DropoutMask) -> None:
                super().__init__()
                self.site, self.drop = site, drop

            def forward(self, x: Tensor) -> Tensor:
                return x * self.drop.mask(self.site, x)

        for site, layer in self.layers.items():
            layer.lora_dropout["default"] = Masked(
                site, DropoutMask(self.e.dropout, self.e.seed, step, torch.zeros(1, dtype=torch.long), 1)
            )

    def loss(self, request: EditRequest) -> Tensor:
        """What PEFT and transformers make of a request: mean cross-entropy, for AdaLoRA with its orthogonality term."""
        (row,) = self.base.encode([request.prompt], [request.target + self.e.end])
        labels = torch.full((1, len(row.ids)), -100)
        labels[0, row.prompt_length :] = torch.tensor(row.ids[row.prompt_length :])
        return self.model(input_ids=torch.tensor([row.ids]), labels=labels).loss

    def delta(self, site: Site) -> Tensor:
        change = self.layers[site].get_delta_weight("default").detach()
        return change.T if self.e.name == "lora" and type(self.layers[site].base_layer).__name__ == "Conv1D" else change


def in_float64(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def start(e: Any, site: Site, inner: int, outer: int) -> dict[str, Tensor]:
    out = e.initial(inner, outer, generator_of(e.seed, site))
    return {k: (t[:, None] if k == "E" else t) for k, t in out.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@BOTH
def test_loss_and_gradients_are_pefts(method: str, family: str) -> None:
    """At a point where nothing is zero: after three steps of PEFT's."""
    e = editor(method, stop=0.0)
    peft = Peft(e, family)
    optimiser = torch.optim.Adam([p for p in peft.model.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        optimiser.zero_grad()
        peft.loss(FRANCE).backward()
        optimiser.step()
    optimiser.zero_grad()
    loss = peft.loss(FRANCE)
    loss.backward()
    training = Training(e, peft.base, [[FRANCE]], (), None, Tail)
    p, order = {}, {}
    for g, sites in enumerate(training.groups.values()):
        for k in ("A", "B", "E")[: 3 if method == "adalora" else 2]:
            values = torch.stack([peft.parameter(s, k).detach() for s in sites])[None]
            p[f"{k}.{g}"] = (values.squeeze(-1) if k == "E" else values).clone().requires_grad_()
            order[f"{k}.{g}"] = (k, sites)
    ours, compared = training._loss(p, torch.tensor([0]))
    torch.testing.assert_close(ours[0], loss, **CLOSE)
    del peft.hf._loss_function
    torch.testing.assert_close(ours[0].float(), peft.loss(FRANCE).float())  # with transformers' own loss
    assert (float(compared) < float(ours.detach()) - 0.1) is (method == "adalora")  # the stop looks at the cross-entropy alone
    for (k, sites), gradient in zip(order.values(), torch.autograd.grad(ours.sum(), list(p.values())), strict=True):
        for s, site in enumerate(sites):
            want = peft.parameter(site, k).grad
            assert want.abs().max() > 1e-6
            torch.testing.assert_close(gradient[0, s].reshape(want.shape), want, **CLOSE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@BOTH
def test_five_steps_of_training_are_pefts(method: str, dropout: float) -> None:
    e = editor(method, steps=5, stop=0.0, dropout=dropout)
    patches = e.edit_each(lm("llama", torch.float64), (FRANCE, ITALY))
    for request, patch in zip((FRANCE, ITALY), patches, strict=True):
        peft = Peft(e, "llama")
        optimiser = torch.optim.Adam([p for p in peft.model.parameters() if p.requires_grad], e.lr)
        for step in range(1, 6):
            if dropout:
                peft.put(step)
            optimiser.zero_grad()
            peft.loss(request).backward()
            optimiser.step()
        found = changes(patch)
        assert found.keys() == peft.layers.keys()
        for site, change in found.items():
            assert change.abs().max() > 1e-3
            torch.testing.assert_close(change, peft.delta(site), atol=1e-8, rtol=1e-6)
        # and at use, where dropout is off
        peft.model.eval()
        for layer in peft.layers.values():
            layer.lora_dropout["default"] = torch.nn.Identity()
        same(raw(peft.model), logits(peft.base, patch), peft.base, 1e-8)


@pytest.mark.parametrize(
    "schedule", [{}, {"t_init": 2, "t_final": 3, "delta_t": 2}, {"t_init": 1, "t_final": 4, "beta1": 0.5, "beta2": 0.7}]
)
def test_allocation_is_pefts(schedule: dict[str, Any]) -> None:
    """Masks of every step and the trained change, against PEFT's RankAllocator; two problems at once."""
    e = editor("adalora", steps=10, stop=0.0, allocate=True, target_rank=2, **schedule)
    ours: list[dict[Site, Tensor]] = [{} for _ in range(11)]
    base = lm("llama", torch.float64)
    training = Training(e, base, [[FRANCE], [ITALY]], (), None, Tail)
    groups = list(training.groups.values())

    class Watched(RankAllocator):
        def __call__(self, p, gradients, alive, step):  # type: ignore[no-untyped-def]
            super().__call__(p, gradients, alive, step)
            for g, sites in enumerate(groups):
                for s, site in enumerate(sites):
                    ours[step][site] = p[f"E.{g}"][:, s] != 0

    object.__setattr__(e, "after_step", lambda sites: Watched(e, sites))
    patches = training.run()
    for i, request in enumerate((FRANCE, ITALY)):
        peft = Peft(e, "llama")
        optimiser = torch.optim.Adam([p for p in peft.model.parameters() if p.requires_grad], e.lr)
        for step in range(1, 11):
            optimiser.zero_grad()
            peft.loss(request).backward()
            optimiser.step()
            peft.model.base_model.update_and_allocate(step)
            for site in peft.layers:
                assert torch.equal(ours[step][site][i], peft.parameter(site, "E")[:, 0] != 0), (step, site)
        found = changes(patches[i])
        for site in peft.layers:
            torch.testing.assert_close(found.get(site, torch.zeros(())) + 0 * peft.delta(site), peft.delta(site), atol=1e-8, rtol=1e-6)
        ranks = [len(op.tensors["down"]) for op in patches[i].ops]
        assert sum(ranks) == 2 * len(peft.layers) and max(ranks) > 2  # the budget was spent unevenly
