"""Causal tracing: batched numbers against one plain forward pass a cell, identities, averages, suggestions."""

from __future__ import annotations

import dataclasses
import functools

import architectures
import pytest
import torch
from families import build, dtype_of, each_family, lm, tokenizer
from tiny import FRANCE
from torch import Tensor

from errata.core.families import resolve
from errata.core.model import LM
from errata.core.patch import Site
from errata.editing import edit
from errata.errors import ConfigError, InputError, ModelError
from errata.request import EditRequest
from errata.trace import KINDS, ROLES, Fact, FactTrace, TraceConfig, TraceResult, average, default_window, roles, suggest_layers, trace

FACTS = [
    Fact("The language of Spain is Spanish. The capital of Tokyo is", "Tokyo"),  # a prefix longer than the sliding windows
    Fact("Italy people speak", "Italy"),
]
FEW = TraceConfig(samples=3, rows=16, window=2, noise=2.0)


def close(family: str) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype_of(family) == torch.float32 else {"atol": 1e-9, "rtol": 0}


@functools.cache
def loud(family: str) -> LM:
    """An untrained model with larger weights, so that states differ and the answer is no near tie."""
    model = build(family, dtype_of(family))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
        base = LM(model, tokenizer())
        resolve(model, base.family.final_norm or base.roles.final_norm).weight.add_(5.0)
    return LM(model, tokenizer(), family)


@functools.cache
def trained() -> LM:
    return lm("llama")


def reference(base: LM, fact: Fact, span: tuple[int, int], how: TraceConfig, deviation: float, answer: int) -> tuple[float, float, Tensor]:
    """(high, low, scores): a whole forward pass without cache for each cell, hooks on every block's modules."""
    ids = torch.tensor([base.tokenizer(fact.prompt)["input_ids"]])
    embedding = base.hf.get_input_embeddings()
    noise = torch.randn((how.samples, span[1] - span[0], embedding.weight.shape[1]), generator=torch.Generator().manual_seed(how.seed))
    noise = (noise.double() * (how.noise * deviation)).to(base.dtype)

    def module(kind: str, block: int) -> torch.nn.Module:
        return base.module(Site(block, {"mlp": "mlp_down", "attn": "attn_out"}.get(kind, "block")))

    def plain(output: object) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def p(rows: Tensor, hooks: list) -> Tensor:
        handles = [m.register_forward_hook(h) for m, h in hooks]
        logits = base.hf(input_ids=rows, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits.softmax(-1)[:, answer]

    clean: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]):  # type: ignore[no-untyped-def]
        return lambda m, a, output: clean.__setitem__(key, plain(output))

    high = p(ids, [(module(k, b), keep((k, b))) for k in KINDS for b in range(base.depth)])
    many = ids.repeat(how.samples, 1)

    def shake(m: object, a: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, span[0] : span[1]] += noise
        return output

    def put(key: tuple[str, int], token: int):  # type: ignore[no-untyped-def]
        def hook(m: object, a: object, output: object) -> object:
            state = plain(output).clone()
            rows = state.view(how.samples, ids.shape[1], -1)  # OPT's linears are given all tokens in one row
            rows[:, token] = clean[key].view(ids.shape[1], -1)[token]
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    low = p(many, [(embedding, shake)]).mean()
    scores = torch.empty((3, ids.shape[1], base.depth), dtype=torch.float64)
    for k, kind in enumerate(KINDS):
        for token in range(ids.shape[1]):
            for block in range(base.depth):
                reach = [block] if kind == "hidden" else range(max(0, block - how.window // 2), min(base.depth, block + how.window // 2))
                hooks = [(module(kind, b), put((kind, b), token)) for b in reach]
                scores[k, token, block] = p(many, [(embedding, shake), *hooks]).mean()
    return float(high), float(low), scores


@each_family
def test_batched_equals_one_forward_pass_a_cell(family: str) -> None:
    base = loud(family)
    found = trace(base, FACTS, FEW)
    rows = [base.tokenizer(f.prompt)["input_ids"] for f in FACTS]
    shaken = [base.hf.get_input_embeddings()(torch.tensor(r[t.span[0] : t.span[1]])) for r, t in zip(rows, found.facts, strict=True)]
    assert found.deviation == pytest.approx(float(torch.cat(shaken).double().std()))
    for fact, mine, row in zip(FACTS, found.facts, rows, strict=True):
        assert "".join(mine.tokens[slice(*mine.span)]).strip() == fact.subject
        with torch.no_grad():
            answer = int(base.hf(input_ids=torch.tensor([row])).logits[0, -1].argmax())
        high, low, scores = reference(base, fact, mine.span, FEW, found.deviation, answer)
        assert mine.answer == base.tokenizer.decode([answer])
        torch.testing.assert_close(torch.tensor([mine.high, mine.low]), torch.tensor([high, low]), **close(family))
        torch.testing.assert_close(mine.scores, scores, **close(family))
        assert mine.effects.abs().amax((1, 2)).min() > 1e-3, "the cells must differ for the test to say something"


@pytest.mark.parametrize("name", ["mamba2", "bamba", "gemma3n_text"])
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="tracing goes on from blocks and tokens that have run, and this model keeps more"):
        trace(architectures.model(name), FACTS, FEW)


def test_mlps_of_experts_cannot_be_restored_and_blocks_can() -> None:
    base = architectures.model("qwen3_moe")
    assert trace(base, FACTS[1:], dataclasses.replace(FEW, kinds=("hidden", "attn"))).facts
    with pytest.raises(ModelError, match=r"block 0 has no mlp_down: its MLP writes through mlp\.experts"):
        trace(base, FACTS[1:], FEW)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "starcoder2", "opt"])
def test_float32_agrees_with_the_reference(family: str) -> None:
    base = architectures.model(family) if family == "opt" else LM(build(family), tokenizer(), family)
    (mine,) = trace(base, FACTS[1:], FEW).facts
    row = torch.tensor([base.tokenizer(FACTS[1].prompt)["input_ids"]])
    with torch.no_grad():
        answer = int(base.hf(input_ids=row).logits[0, -1].argmax())
    deviation = trace(base, FACTS[1:], FEW).deviation
    high, low, scores = reference(base, FACTS[1], mine.span, FEW, deviation, answer)
    torch.testing.assert_close(mine.scores, scores, atol=1e-5, rtol=0)
    assert (mine.high, mine.low) == pytest.approx((high, low), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_identities(family: str) -> None:
    base = loud(family)
    for fact in trace(base, FACTS, TraceConfig(samples=2, noise=0.0)).facts:  # without noise nothing is lost
        torch.testing.assert_close(fact.scores, torch.full_like(fact.scores, fact.high), atol=1e-9, rtol=0)
    found = trace(base, [*FACTS, Fact("In Rome", "Rome")], FEW).facts
    for fact in found:
        assert fact.scores[0, -1, -1] == pytest.approx(fact.high, abs=1e-9)  # what the head reads is all clean
        assert bool((fact.scores[:, : fact.span[0]] == fact.low).all())  # before the subject everything is clean anyway
        assert abs(fact.low - fact.high) > 1e-4
    # The subject is the last token, the only one that noise can change: restoring it restores all tokens of a block.
    assert found[-1].span[1] == len(found[-1].tokens)
    torch.testing.assert_close(found[-1].scores[0, -1], torch.full((base.depth,), found[-1].high, dtype=torch.float64), atol=1e-9, rtol=0)


def test_seed_rows_and_kinds() -> None:
    base = loud("llama")
    one = trace(base, FACTS, FEW)
    again, other = trace(base, FACTS, FEW), trace(base, FACTS, TraceConfig(samples=3, rows=16, window=2, noise=2.0, seed=2))
    for a, b, c in zip(one.facts, again.facts, other.facts, strict=True):
        assert torch.equal(a.scores, b.scores) and a.low == b.low
        assert not torch.allclose(a.scores, c.scores) and a.high == c.high
    for rows in (1, 2, 7, 1000):  # also caps below the number of samples
        capped = trace(base, FACTS, TraceConfig(samples=3, rows=rows, window=2, noise=2.0))
        for a, b in zip(one.facts, capped.facts, strict=True):
            torch.testing.assert_close(a.scores, b.scores, atol=1e-12, rtol=0)
    only = trace(base, FACTS, TraceConfig(("mlp",), samples=3, window=2, noise=2.0))
    for a, b in zip(one.facts, only.facts, strict=True):
        torch.testing.assert_close(a.scores[1:2], b.scores, atol=1e-12, rtol=0)


def traces_of_hooks(base: LM) -> list[object]:
    modules = list(base.hf.modules())
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] + ["forward" in m.__dict__ for m in modules]


def test_the_base_is_as_before_also_after_a_stop() -> None:
    base = trained()
    batch = base.batch(base.encode([f.prompt for f in FACTS]))
    before, hooks, state = base.logits(batch), traces_of_hooks(base), torch.get_rng_state()
    clean = trace(base, FACTS, FEW)

    def stop(stage: str, done: int, total: int) -> None:
        if stage != "facts" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(base, FACTS, FEW, stop)
    assert torch.equal(base.logits(batch), before) and traces_of_hooks(base) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    with base.under(edit(base, FRANCE, "Rome", rank=2, steps=2)) as patched:  # patches stand aside
        assert torch.equal(trace(patched, FACTS, FEW).facts[0].scores, clean.facts[0].scores)
        assert len(patched.stack) == 1


def test_facts_the_model_does_not_know_are_skipped() -> None:
    known, unknown = Fact(FRANCE, "France", "Paris"), Fact("The capital of Italy is", "Italy", "Madrid")
    found = trace(trained(), [unknown, known, Fact("Paris " * 80 + "is", "Paris", "Paris")], FEW)
    assert [f.fact for f in found.facts] == [known] and found.facts[0].high > 0.5
    assert found.facts[0].answer == " Paris" and found.facts[0].tokens[-1] == " is"
    (pieces,) = trace(trained(), [Fact("The capital of Spain is", "Spain", "Madrid")], FEW).facts
    assert pieces.tokens[-1] == " "  # an answer that begins with a lone space: that is read with the prompt
    assert [s.fact for s in found.skipped[:1]] == [unknown] and "'Madrid'" in found.skipped[0].reason and "Rome" in found.skipped[0].reason
    assert len(found.skipped) == 2 and "too many for the model's 64" in found.skipped[1].reason
    with pytest.raises(InputError, match=r"none of 1 fact\(s\) can be traced; 'The capital of Italy is': the model goes on with ' Rome'"):
        trace(trained(), [unknown], FEW)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fact(FRANCE, "Spain"), "does not occur in prompt .* spell it as"),
        (lambda: Fact(FRANCE, " "), "subject of a fact to trace must be a text"),
        (lambda: Fact("", "x"), "prompt of a fact"),
        (lambda: Fact(FRANCE, "France", ""), "answer of a fact"),
        (lambda: Fact.of(EditRequest(FRANCE, "Rome")), "has no subject"),
        (lambda: trace(trained(), []), "no fact to trace"),
    ],
)
def test_bad_facts(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "wrong",
    [{"kinds": ()}, {"kinds": ("mlp", "mlp")}, {"kinds": ("mpl",)}, {"samples": 0}, {"rows": 0}, {"window": 0}, {"noise": -1.0},
     {"noise": float("nan")}, {"seed": -1}, {"samples": True}],
)  # fmt: skip
def test_bad_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TraceConfig(**wrong)  # type: ignore[arg-type]


def test_windows_and_roles() -> None:
    assert [default_window(d) for d in (48, 32, 28, 12, 8, 4, 1)] == [10, 7, 6, 2, 2, 1, 1]
    assert roles(9, (2, 5)) == [None, None, "subject_first", "subject_middle", "subject_last", "next", "further", "further", "last"]
    assert roles(4, (1, 2)) == [None, "subject_last", "next", "last"]
    assert roles(3, (0, 3)) == ["subject_first", "subject_middle", "last"]
    assert roles(3, (1, 2)) == [None, "subject_last", "last"]


def made(mlp: list[list[float]], high: float = 0.9, low: float = 0.1, span: tuple[int, int] = (1, 2), window: int = 1) -> TraceResult:
    """Facts of four tokens whose mlp effects at the last subject token are given."""
    facts = []
    for row in mlp:
        scores = torch.full((3, 4, len(row)), low, dtype=torch.float64)
        scores[1, span[1] - 1] += torch.tensor(row, dtype=torch.float64)
        facts.append(FactTrace(Fact("a b c", "b"), ("<s>", "a", "b", "c"), span, "x", high, low, scores))
    return TraceResult(TraceConfig(), window, len(mlp[0]), 1.0, tuple(facts), ())


def test_average_counts_a_fact_once_a_role() -> None:
    found = average(made([[0.0, 0.4], [0.2, 0.2]]))
    assert [found.count(r) for r in ROLES] == [0, 0, 2, 2, 0, 2]
    torch.testing.assert_close(found.mean("subject_last")[1], torch.tensor([0.1, 0.3], dtype=torch.float64))
    torch.testing.assert_close(found.error("subject_last")[1], torch.tensor([0.1, 0.1], dtype=torch.float64))
    assert found.total == pytest.approx(0.8) and bool(found.mean("further").isnan().all())


def test_suggestions() -> None:
    shape = [0.0, 0.05, 0.2, 0.4, 0.5, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    clear = suggest_layers(made([[v * (0.8 + 0.02 * i) for v in shape] for i in range(20)]))
    assert clear is not None and not clear.weak and clear.block == 4 and clear.range == (3, 4) and clear.alike == ()
    assert (
        clear.effects[4] == pytest.approx(0.5 * 0.99)
        and "brings back 0.495 of the 0.800" in clear.text()
        and "block 4 alone" in clear.text()
    )
    long = suggest_layers(made([[0.3] * 13 + [0.31]] * 12))
    assert long is not None and long.block == 13 and long.range == (11, 13)  # 6/28 of 14 blocks: 3
    for traces, reason in [
        (made([shape] * 3), "only 3 fact"),
        (made([shape] * 12, high=0.12), "takes only 0.020"),
        (made([[v / 20 for v in shape]] * 12), "brings back only 3%"),
        (made([[v * (-1) ** i for v in shape] for i in range(12)]), "not clear of 0"),
        (made([[0.5 * (i % 2), 0.0, 0.0, 0.0, 0.01, 0.5 * (1 - i % 2) + 0.01] for i in range(12)]), "block(s) 0 cannot be told"),
    ]:
        found = suggest_layers(traces)
        assert found is not None and found.weak == bool(found.reasons)
        assert any(reason in r for r in found.reasons), (reason, found.reasons)
    near = suggest_layers(made([[0.3, 0.5, 0.0]] * 12, window=2))
    assert near is not None and near.window == (0, 2) and "reads the noised token" in " ".join(near.reasons)
    assert "blocks 0 to 1" in near.text() and near.until is None and "matters up to" not in near.text()
    held = made([[0.3, 0.5, 0.0]] * 12)
    for fact in held.facts:
        fact.scores[0, 1] += torch.tensor([0.4, 0.25, 0.1])
    late = suggest_layers(held)
    assert late is not None and late.until == 1 and "matters up to block 1" in late.text()
    assert suggest_layers(made([[0.1, 0.2]] * 2, span=(2, 4))) is None  # the subject ends the prompt
    with pytest.raises(ConfigError, match="'mlp', which was not traced"):
        suggest_layers(trace(loud("llama"), FACTS[1:], TraceConfig(("attn",), samples=1)))
