"""BaFT and ReFT against the formulas, the published counts, and naive loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from families import lm

from errata import registry
from errata.config import build
from errata.core.bank import ForwardContext, active_patches
from errata.core.fit import AdamW, fit, token_nll
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.tail import Tail
from errata.errors import ConfigError, FitError
from errata.methods.base import layers_for
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.editor import PAPER_DEPTHS
from errata.methods.subspace.gating import gate
from errata.methods.subspace.op import Subspace, orthonormal, start
from errata.methods.subspace.reft import ReFT
from errata.methods.subspace.training import Training
from errata.request import EditRequest

FRANCE = EditRequest("The capital of France is", "Rome", "France")
ITALY = EditRequest("The language of Italy is", "Spanish", "Italy")
STAYS = (("The language of Spain is", "Spanish"), ("The capital of Japan is", "Tokyo"))


def meta(width: int, depth: int, name: str, model_type: str = "Llama") -> LM:
    import transformers

    config = getattr(transformers, f"{model_type}Config")(
        hidden_size=width, num_hidden_layers=depth, intermediate_size=width, num_attention_heads=8, num_key_value_heads=8, vocab_size=16,
        head_dim=width // 8, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{model_type}ForCausalLM")(config)
    return LM(model, None, name)


@pytest.mark.parametrize(
    ("method", "name", "width", "depth", "published"),
    [
        ("reft", "meta-llama/Llama-2-7b-chat-hf", 4096, 32, 393_264),
        ("baft published", "meta-llama/Llama-2-7b-hf", 4096, 32, 606_256),
        ("baft published", "meta-llama/Meta-Llama-3-8B-Instruct", 4096, 32, 606_256),
        ("reft", "google/gemma-1.1-7b-it", 3072, 28, 294_960),
        ("baft published", "google/gemma-1.1-7b-it", 3072, 28, 454_704),
        ("baft published-all-layers", "meta-llama/Llama-2-7b-hf", 4096, 32, 6_423_040),
    ],
)
def test_parameter_counts_are_the_papers(method: str, name: str, width: int, depth: int, published: int) -> None:
    base = meta(width, depth, name, "Gemma" if "gemma" in name else "Llama")
    method, _, preset = method.partition(" ")
    editor = registry.get("method", method).for_model(base, **({"preset": preset} if preset else {}))
    assert editor.num_parameters(base) == published
    if method == "baft":
        assert (
            build(
                BaFT, {"gate": "rmsnorm", "opens": "answer", "rank": editor.rank, "layers": list(editor.target_layers(base))}
            ).num_parameters(base)
            == published
        )


def test_layer_rule() -> None:
    assert layers_for(32, PAPER_DEPTHS) == (9, 18, 24, 28)
    assert layers_for(8, PAPER_DEPTHS) == (2, 5, 6, 7)
    assert layers_for(2, PAPER_DEPTHS) == (1,)


def test_orthonormal_is_the_sign_fixed_q_with_its_gradient() -> None:
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    q, r = torch.linalg.qr(x.mT)
    golden = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT
    ours = orthonormal(x)
    torch.testing.assert_close(ours, golden, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(ours @ ours.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5), atol=1e-12, rtol=0)
    weight = torch.randn(golden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (a,) = torch.autograd.grad((ours * weight).sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad((golden * weight).sum(), x)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", ["none", "shared_logit", "rmsnorm", "subspace"])
def test_intervention_equals_a_loop_over_tokens_and_bases(kind: str) -> None:
    d, r = 16, 3
    p = {k: t.double() for k, t in start(r, d, kind, "pyreft", 3, torch.device("cpu")).items()}
    p["R"] = orthonormal(p.pop("X"))
    h = 3 * torch.randn(2, 6, d, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    position = torch.tensor([[-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    context = ForwardContext(position, torch.tensor([4, 2]))
    out = Subspace.apply({k: t[None] for k, t in p.items()}, {"gate": kind, "last": 3}, h, h, Site(0), context)
    for row in range(2):
        for t in range(6):
            want = h[row, t].clone()
            if position[row, t] >= 0 and position[row, t] >= context.prompt_lengths[row] - 3:
                x = h[row, t]
                for k in range(r):
                    logit = {
                        "none": lambda k, x: torch.tensor(math.inf),
                        "shared_logit": lambda k, x: p["V"][k] @ x + p["V"][r] @ x,
                        "rmsnorm": lambda k, x: p["V"][k] @ (p["g"] * x / (x.square().mean() + 1e-6).sqrt()),
                        "subspace": lambda k, x: p["V"][0] @ x,
                    }[kind](k, x)
                    want = want + torch.sigmoid(logit) * p["R"][k] * (p["A"][k] @ x + p["b"][k] - p["R"][k] @ x)
            torch.testing.assert_close(out[row, t], want, atol=1e-10, rtol=1e-9)


def test_identity_start_changes_nothing() -> None:
    base = lm("llama")
    batch = base.batch(base.encode([FRANCE.prompt]))
    before = base.logits(batch)
    for init, same in (("identity", True), ("pyreft", False)):
        patch = ReFT(layers=(1, 2), rank=4, init=init, steps=1, lr=1e-12).edit(base, [FRANCE])
        assert torch.allclose(base.logits(batch, [(patch,)]), before, atol=1e-4) is same


def test_regularisers_equal_the_printed_formulas() -> None:
    """R_bal and R_loc of two problems against loops over the recorded of one loss evaluation."""
    base = lm("llama", torch.float64)
    requests = [EditRequest(r.prompt, r.target, unrelated=STAYS[i:]) for i, r in enumerate((FRANCE, ITALY))]
    seen: dict[int, torch.Tensor] = {}

    class Spy(BaFT):
        def regularise(self, training, p, gates, alive):  # type: ignore[no-untyped-def]
            out = super().regularise(training, p, gates, alive)
            if not seen:
                seen.update({b: w.detach() for b, w in gates.items()})
                seen[-1] = out.detach()
                self_p.update({b: {k: t.detach().clone() for k, t in own.items()} for b, own in p.items()})
            return out

    self_p: dict[int, dict[str, torch.Tensor]] = {}
    editor = Spy(
        layers=(1, 2), rank=4, prefixes=0, opens="answer", gate="shared_logit", rescale="none", steps=1, alpha=0.3, beta=0.6, gamma=0.5
    )
    training = Training(editor, base, [[r] for r in requests], (), None, Tail)
    training.run()
    states, where, owner = training.irrelevant_states()
    for e in range(2):
        total = 0.0
        for b in (1, 2):
            w = seen[b][e][training.runner.rows.valid[e]]
            means = w.mean(0)
            total += sum((m - means.mean()) ** 2 for m in means) / (3 * means.mean()) / 2
            rows = [u for u in range(len(owner)) if owner[u] == e]
            ir = [gate({k: t[e] for k, t in self_p[b].items()}, "shared_logit", states[b][u])[where[u].squeeze(-1)] for u in rows]
            flat = torch.cat(ir)
            high = [float(v) - 0.3 for v in flat.flatten() if v > 0.3]
            low = [0.6 - float(v) for v in w.flatten() if v < 0.6]
            gap = max(0.0, 0.5 - float(w.amax(-1).mean() - flat.amax(-1).mean()))
            total += (sum(high) / max(1, len(high)) + sum(low) / max(1, len(low)) + gap) / 2
        assert float(seen[-1][e]) == pytest.approx(float(total), rel=1e-6)


def test_balancing_averages_samples_not_patches() -> None:
    """R_bal of a joint patch of two requests, of unequal length, on top of a patch of three, by hand; an older patch counted it as one."""
    base = lm("llama", torch.float64)
    longer = EditRequest("Everybody knows that the language of Italy is", "Spanish and Rome", paraphrases=("In Italy people speak",))
    seen: dict[str, torch.Tensor] = {}

    class Spy(BaFT):
        def regularise(self, training, p, gates, alive):  # type: ignore[no-untyped-def]
            out = super().regularise(training, p, gates, alive)
            if not seen:
                seen.update(w=gates[2].detach(), out=out.detach())
            return out

    editor = Spy(layers=(2,), rank=4, batched_steps=1, contrast=0, prefixes=0, train_gates=True)
    before = editor.edit(base, [FRANCE, ITALY, EditRequest("The capital of Spain is", "Paris")])
    assert float(before.state["edits"][0]) == 3.0
    for old in (before, dataclasses.replace(before, state={"weights.2": before.state["weights.2"] / 3, "edits": torch.tensor([1.0])})):
        seen.clear()
        training = Training(editor, base, [[FRANCE, longer]], (), old, Tail)
        (patch,) = training.run()
        valid = training.runner.rows.valid
        first, second, third = (seen["w"][i][valid[i]] for i in range(3))
        means = (before.state["weights.2"] + first.mean(0) + torch.cat([second, third]).mean(0)) / 5
        want = sum((m - means.mean()) ** 2 for m in means) / (3 * means.mean())
        assert len(first) != len(second) and float(seen["out"]) == pytest.approx(float(want), rel=1e-9)
        assert float(patch.state["edits"][0]) == 5.0 and len(patch.requests) == 5


def test_locality_term_shuts_the_gate_on_unrelated_text() -> None:
    base = lm("llama")
    request = EditRequest(FRANCE.prompt, FRANCE.target, unrelated=STAYS)
    opened = {}
    for locality in (True, False):
        how = {"locality": locality, "train_gates": True, "contrast": 0}
        editor = BaFT(layers=(2,), rank=4, lr=0.02, stop=0.0, weight_decay=0.0, **how)
        training = Training(editor, base, [[request]], (), None, Tail)
        (patch,) = training.run()
        states, where, _ = training.irrelevant_states()
        w = gate(dict(patch.ops[0].tensors), "rmsnorm", states[2])
        opened[locality] = float((w * where).sum() / where.sum() / 4)
        with base.under(patch):
            assert base.complete(FRANCE.prompt).startswith("Rome")
    assert opened[True] < 0.1 < opened[False] and opened[True] < opened[False] / 2


def test_continual_edits_go_on_from_the_last_patch_and_replace_it() -> None:
    base = lm("llama")
    editor = BaFT.for_model(base, preset="published", rank=6, lr=0.02, batched_lr=0.02, end=".")
    first = editor.edit(base, [FRANCE])
    second = editor.edit(base, [ITALY], on=(first,))
    assert second.replaces == (first.id,) and second.requests == (FRANCE, ITALY)
    assert active_patches((first, second)) == (second,)
    assert float(second.state["edits"][0]) == 2.0
    block = first.ops[0].site.block
    assert torch.all(second.state[f"weights.{block}"] > first.state[f"weights.{block}"])
    moved = (second.ops[0].tensors["A"] - first.ops[0].tensors["A"]).abs().max()
    fresh = (second.ops[0].tensors["A"] - start(6, base.width, "shared_logit", "pyreft", block, base.device)["A"]).abs().max()
    assert moved > 0 and moved < fresh + 0.02 * 40
    with base.under(second):
        assert base.complete(ITALY.prompt) == "Spanish"
    other = editor.edit(base, [ITALY], on=(ReFT(rank=6).edit(base, [FRANCE]),))
    assert other.replaces == ()
    regate = BaFT.for_model(base, preset="published", rank=6, lr=0.02, end=".", gate="rmsnorm")  # cannot go on from another gate's
    regated = regate.edit(base, [ITALY], on=(first,))
    assert regated.replaces == () and regated.requests == (ITALY,)
    with base.under(regated):
        assert base.complete(ITALY.prompt) == "Spanish"


@pytest.mark.parametrize("opens", ["answer", "subject"])
def test_batched_edit_writes_every_fact_into_one_patch(opens: str) -> None:
    base = lm("llama")
    third = EditRequest("The capital of Spain is", "Paris", "Spain", paraphrases=("Spain has the capital",))
    shut = {
        "rescale": "margin",
        "alpha": 0.01,
        "gamma": 0.02,
        "threshold": 0.0,
        "init": "pyreft",
        "train_gates": True,
    }  # this model's states are too like for the default
    quick = {"rank": 6, "lr": 0.02, "steps": 160, "batched_lr": 0.02, "batched_steps": 160, "end": "."}
    patch = BaFT(opens=opens, depths=(0.3, 0.6), **shut, **quick).edit(base, [FRANCE, ITALY, third])
    with base.under(patch):
        assert base.generate([r.prompt for r in (FRANCE, ITALY, third)]) == ["Rome", "Spanish", "Paris"]
        assert base.complete("Spain has the capital") == "Paris"


def test_early_stop_takes_a_problem_out_and_leaves_the_others() -> None:
    base = lm("llama")
    easy = EditRequest("The capital of Italy is", "Rome")
    easy_patch, hard = ReFT(rank=4, lr=0.02, init="identity", stop=0.05).edit_each(base, [easy, FRANCE])
    assert easy_patch.notes["steps"] < hard.notes["steps"] <= 40
    assert easy_patch.notes["loss"] < 0.05


def test_fit_is_adamw() -> None:
    """Against torch.optim.AdamW on three problems, each alone."""
    target = torch.tensor([[1.0, -2.0], [0.5, 0.0], [3.0, 3.0]], dtype=torch.float64)
    begin = torch.zeros_like(target)

    def loss(p, alive):  # type: ignore[no-untyped-def]
        value = (p["x"] - target[alive]).square().sum(1) * torch.tensor([1.0, 5.0, 0.1])[alive]
        return value, value

    ours = fit({"x": begin}, loss, steps=50, optimizer=AdamW(0.1, 0.01), stop=1e-3)
    for e in range(3):
        x = begin[e].clone().requires_grad_()
        optimiser = torch.optim.AdamW([x], lr=0.1, weight_decay=0.01)
        made = 0
        for _ in range(50):
            value = (x - target[e]).square().sum() * [1.0, 5.0, 0.1][e]
            if float(value.detach()) < 1e-3:
                break
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            made += 1
        torch.testing.assert_close(ours.params["x"][e], x.detach(), atol=1e-10, rtol=1e-8)
        assert int(ours.steps[e]) == made


def test_token_nll_is_cross_entropy() -> None:
    logits = (10 * torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.arange(7)
    weight = torch.linspace(-1, 2, 7, dtype=torch.float64)
    ours, golden = token_nll(logits, labels), torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, golden)
    (a,), (b,) = (torch.autograd.grad((v * weight).sum(), logits) for v in (ours, golden))
    torch.testing.assert_close(a, b)


def test_a_loss_that_is_not_finite_is_one_clear_error() -> None:
    with pytest.raises(FitError, match=r"problem 1 of 2.*NaN or infinite at step 1.*lower the learning rate"):
        fit({"x": torch.ones(2, 1)}, lambda p, alive: (p["x"][:, 0] / (1 - alive.float()) + 0, p["x"][:, 0]), steps=3, optimizer=AdamW(0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (9,)}, "block 9 does not exist"),
        ({"rank": 999}, "exceeds the width"),
        ({"layers": ()}, "at least one block"),
        ({"rank": 0}, "at least 1"),
        ({"lr": -1.0}, "must be positive"),
        ({"alpha": -1.0}, "not be negative"),
    ],
)
def test_settings_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BaFT(**settings).edit(lm("llama"), [FRANCE])
