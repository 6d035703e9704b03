"""Gates that begin at a ridge solution: the formula, both sides, and alone as in a batch."""

from __future__ import annotations

import torch
from families import lm

from errata.core.tail import Tail
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.gate_start import ridge_gates
from errata.methods.subspace.gating import gate
from errata.methods.subspace.training import Training
from errata.request import EditRequest

STAYS = (("The capital of Italy is", "Rome"), ("The capital of Spain is", "Madrid"), ("The capital of Japan is", "Tokyo"))
FRANCE = EditRequest("The capital of France is", "Rome", "France", contrast=STAYS)
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy", contrast=(("The language of Spain is", "Spanish"),))
PLAINLY, TWICE = BaFT(layers=(1, 2), rank=4, prefixes=0, opens="answer"), BaFT(layers=(1,), rank=4, prefixes=2, opens="answer")
PLAIN = EditRequest("In Rome people speak", "French")


def test_it_solves_the_weighted_ridge_problem() -> None:
    """Against the d×d normal equations, on states read one text at a time."""
    base = lm("llama", torch.float64)
    found = ridge_gates(Training(PLAINLY, base, [[FRANCE]], (), None, Tail))
    for block, v in found[0].items():
        rows, wanted = [], []
        for prompt, answer, own in ((FRANCE.prompt, FRANCE.target, True), *((p, a, False) for p, a in STAYS)):
            (text,) = base.encode([prompt], [answer])
            with torch.no_grad():
                states = base.hf(torch.tensor([text.ids]), output_hidden_states=True).hidden_states
            h = states[block + 1][0] if block + 1 < base.depth else last_block(base, text.ids)
            h = h[(text.prompt_length - 2 if own else max(0, text.prompt_length - 3)) :]  # from "France" on: "of" is in all four
            rows.append(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))
            wanted += [own] * (len(h) - 1) + [False]  # the target's last token ends the edit
        x, own = torch.cat(rows), torch.tensor(wanted)
        y = torch.where(own, 2.0, -6.0).double()
        c = torch.where(own, 1 / own.sum(), 1 / (~own).sum()).double() * len(y) / 2
        penalty = 0.03 * x.square().sum(-1).mean()
        want = torch.linalg.solve(x.T @ (c[:, None] * x) + penalty * torch.eye(x.shape[1]).double(), x.T @ (c * y))
        torch.testing.assert_close(v, want, atol=1e-8, rtol=1e-6)


def last_block(base, ids):  # type: ignore[no-untyped-def]
    """The last block's output before the model's last norm, which transformers does not give."""
    seen = {}
    handle = base.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(h=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        base.hf(torch.tensor([ids]))
    handle.remove()
    return seen["h"][0]


def test_gates_begin_open_on_the_edit_and_shut_elsewhere() -> None:
    base = lm("llama")
    editor = BaFT(layers=(1, 2), rank=4, prefixes=0, opens="answer")
    training = Training(editor, base, [[FRANCE], [ITALY], [PLAIN]], (), None, Tail)
    blocks = training.per_block(training._start())
    states, where, owner = training.irrelevant_states()
    for block in (1, 2):
        own = {k: blocks[block][k] for k in ("V", "g")}
        shut = gate({k: t[owner] for k, t in own.items()}, "rmsnorm", states[block]) * where
        for problem in (0, 1):
            assert float(shut[owner == problem].amax()) < 0.3  # the target itself is an answer of a neighbour here
        assert not torch.equal(own["V"][0], own["V"][1])
    random = Training(
        BaFT(layers=(1, 2), rank=4, gate_start="random", prefixes=0, opens="answer"), base, [[FRANCE], [PLAIN]], (), None, Tail
    )
    plain = random.per_block(random._start())
    for block in (1, 2):  # a request that says nothing of what should stay begins as ever
        torch.testing.assert_close(blocks[block]["V"][2], plain[block]["V"][1])


def test_alone_as_in_a_batch() -> None:
    base = lm("llama", torch.float64)
    together = ridge_gates(Training(TWICE, base, [[FRANCE], [PLAIN], [ITALY]], (), None, Tail))
    assert sorted(together) == [0, 2]
    for place, request in ((0, FRANCE), (2, ITALY)):
        torch.testing.assert_close(
            together[place][1], ridge_gates(Training(TWICE, base, [[request]], (), None, Tail))[0][1], atol=1e-9, rtol=1e-7
        )
