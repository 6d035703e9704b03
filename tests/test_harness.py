"""lm-evaluation-harness on patched models (where lm-eval is installed; it is not among the test requirements)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import SENTENCES, lm

from errata.errors import ConfigError
from errata.methods.subspace.reft import ReFT
from errata.request import EditRequest

PROMPT = "The capital of France is"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "errata.score.harness", raising=False)
    with pytest.raises(ConfigError, match="pip install 'errata\\[harness\\]'"):
        import errata.score.harness  # noqa: F401


def asked(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture
def harness() -> object:
    pytest.importorskip("lm_eval")
    from errata.score.harness import HarnessLM

    base = lm("llama")
    patch = ReFT(rank=4, lr=0.02, layers=(3,)).edit(base, [EditRequest(PROMPT, "Rome")])
    return HarnessLM(base), HarnessLM(base, (patch,), rows=2)


def test_likelihoods_are_those_of_the_patched_model(harness: tuple) -> None:  # type: ignore[type-arg]
    plain, patched = harness
    pairs = [asked(PROMPT, f" {a}") for a in ("Paris", "Rome", "Madrid")] + [asked("The capital of Japan is", " Tokyo")]
    before, after = plain.loglikelihood(pairs, disable_tqdm=True), patched.loglikelihood(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in before] == [True, False, False, True] and [g for _, g in after][:3] == [False, True, False]
    base, stack = patched.lm, patched.stack
    for request, (said, _) in zip(pairs, after, strict=True):
        row = base.encode([request.args[0]], [request.args[1]])
        log_p = base.logits(base.batch(row), [stack])[0].log_softmax(-1)
        n = len(row[0].target)
        want = sum(float(log_p[-n - 1 + i, t]) for i, t in enumerate(row[0].target))
        assert said == pytest.approx(want, abs=1e-4)


def test_a_long_text_counts_every_token_once(harness: tuple) -> None:  # type: ignore[type-arg]
    plain, _ = harness
    text = " ".join(f"{p} {a}." for p, a in SENTENCES[:3])
    ids = torch.tensor([[1, *plain.tok_encode(text, add_special_tokens=False)]])
    with torch.no_grad():
        log_p = plain.lm.hf(ids).logits[0, :-1].log_softmax(-1)
    want = float(log_p.gather(1, ids[0, 1:, None]).sum())
    assert plain.loglikelihood_rolling([asked(text)]) == [pytest.approx(want, abs=1e-3)]
    plain.length = 8
    windows = plain.loglikelihood_rolling([asked(text)])[0]
    alone = 0.0
    for start in range(1, ids.shape[1], 7):
        end = min(start + 7, ids.shape[1])
        row = ids[:, max(0, end - 8) : end]
        with torch.no_grad():
            got = plain.lm.hf(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])
        alone += float(got[-(end - start) :].sum())
    assert windows == pytest.approx(alone, abs=1e-3)


def test_generation_ends_where_the_task_says(harness: tuple) -> None:  # type: ignore[type-arg]
    plain, patched = harness
    how = {"until": ["."], "max_gen_toks": 6}
    assert [m.generate_until([asked(PROMPT, how)])[0].strip() for m in (plain, patched)] == ["Paris", "Rome"]
    with pytest.raises(ConfigError, match="only greedy"):
        plain.generate_until([asked(PROMPT, {"do_sample": True, "temperature": 0.7})])


def test_a_local_task_of_the_real_harness(harness: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    data = tmp_path / "capitals.jsonl"
    options = ["Paris", "Rome", "Tokyo"]
    rows = [{"q": p, "options": options, "gold": options.index(a)} for p, a in SENTENCES if "capital" in p and a in options]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "capitals.yaml").write_text(
        f"""
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = [
        evaluator.simple_evaluate(model=m, tasks=["capitals"], task_manager=manager, bootstrap_iters=0)["results"]["capitals"]["acc,none"]
        for m in harness
    ]
    assert found[0] == 1.0 and found[1] == pytest.approx(2 / 3)
