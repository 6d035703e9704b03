"""Gates that stay at their ridge solution: only what is written through them is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import lm

from errata.analyse import gate_training
from errata.core.tail import Tail
from errata.errors import ConfigError
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.gate_start import ridge_gates
from errata.methods.subspace.training import Training
from errata.request import Case, EditRequest, Probe

FRANCE = EditRequest("The capital of France is", "Rome", "France")
SPAIN = EditRequest("The language of Spain is", "French", "Spain")
NOBODY = EditRequest("In Rome people speak", "French", contrast=(("In Paris people speak", "French"),))
EDITOR = BaFT(layers=(1, 2), rank=4, prefixes=2, contrast=0, steps=12, lr=0.02, stop=0.0)


def _solved(request: EditRequest, block: int) -> torch.Tensor:
    return ridge_gates(Training(EDITOR, lm("llama"), [[request]], (), None, Tail))[0][block]


def test_gates_are_the_solution_and_what_is_written_is_trained() -> None:
    base = lm("llama")
    kept, trained = (editor.edit(base, [FRANCE]) for editor in (EDITOR, replace(EDITOR, train_gates=True)))
    untrained = replace(EDITOR, stop=1e9).edit(base, [FRANCE])
    for a, b, c in zip(kept.ops, trained.ops, untrained.ops, strict=True):
        assert torch.equal(a.tensors["V"], c.tensors["V"]) and torch.equal(a.tensors["g"], torch.ones_like(a.tensors["g"]))
        assert not torch.equal(b.tensors["V"], c.tensors["V"])
        assert not torch.allclose(a.tensors["A"], c.tensors["A"], atol=1e-3)
        spread = a.tensors["V"] - _solved(FRANCE, a.site.block)  # a tenth of the random start lies between the bases of a patch
        assert float(spread.abs().max()) <= 0.1 * a.tensors["V"].shape[1] ** -0.5 + 1e-6
    assert base.fingerprint == kept.base and "weights.1" in kept.state  # the running means are kept, too


def test_each_problem_keeps_its_own_gates_where_others_end_before_it() -> None:
    """Rows of ended problems leave the batch; the gates of those that run must not move up."""
    base, editor = lm("llama", torch.float64), replace(EDITOR, steps=60, stop=1.0, other_facts=0, prefixes=0)
    together = editor.edit_each(base, [FRANCE, SPAIN])
    assert len({patch.notes["steps"] for patch in together}) == 2
    for patch, request in zip(together, (FRANCE, SPAIN), strict=True):
        alone = editor.edit(base, [request])
        assert alone.notes["steps"] == patch.notes["steps"]
        for a, b in zip(alone.ops, patch.ops, strict=True):
            for name in a.tensors:
                torch.testing.assert_close(a.tensors[name], b.tensors[name], atol=1e-4, rtol=1e-3)


def test_where_an_answer_is_given_gates_train() -> None:
    base = lm("llama")
    few, many = (replace(EDITOR, stop=stop).edit(base, [NOBODY]) for stop in (1e9, 0.0))
    assert not any(torch.equal(a.tensors["V"], b.tensors["V"]) for a, b in zip(few.ops, many.ops, strict=True))


def test_the_two_losses_are_compared_on_trained_gates_only() -> None:
    case = Case(FRANCE, (Probe("rewrite", FRANCE.prompt, FRANCE.target),))
    with pytest.raises(ConfigError, match="train_gates=true"):
        gate_training.balance(lm("llama"), EDITOR, [case], gate_training.GateRun())
    unnamed = Case(NOBODY, (Probe("rewrite", NOBODY.prompt, NOBODY.target),))
    grown = gate_training.run_continual(lm("llama"), EDITOR, [unnamed], [1])
    assert {row["variant"] for row in gate_training.balance(lm("llama"), EDITOR, [unnamed], grown)} == {"with", "without"}
