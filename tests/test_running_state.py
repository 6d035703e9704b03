"""Models some of whose layers keep a running state (linear attention): nothing may go on from it twice, or by several tokens at once."""

from __future__ import annotations

import functools

import pytest
import torch
from families import SENTENCES, tokenizer

from errata.config import build
from errata.core.bank import Bank
from errata.core.decode import PrefilledBatch
from errata.core.model import LM
from errata.core.patch import Site
from errata.core.tail import FullForward, Tail, split_rows
from errata.methods.subspace.op import orthonormal, start
from errata.methods.subspace.reft import ReFT
from errata.request import EditRequest
from errata.score import teacher_forcing
from errata.score.evaluator import AnswerCache, ask

PROMPTS = [p for p, _ in SENTENCES[:4]]


@functools.cache
def hybrid() -> LM:
    """Linear attention in three blocks of four."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says that it has no fast kernels
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=0, mlp_only_layers=[0, 1, 2, 3], max_position_embeddings=64,
    )  # fmt: skip
    return LM(Qwen3NextForCausalLM(config), tokenizer(), "hybrid")


def test_answers_are_those_of_whole_texts() -> None:
    lm = hybrid()
    patch = build(ReFT, {"rank": 4, "lr": 0.02, "steps": 3}).edit(lm, [EditRequest(PROMPTS[0], "Rome")])
    answers = AnswerCache()
    ask(lm, [(s, p, ["Rome", "Madrid and Tokyo"], 12) for s in ((), (patch,)) for p in PROMPTS], answers)
    for (name, prompt, target), found in answers.forced.items():
        (alone,) = teacher_forcing.score_full_texts(lm, lm.encode([prompt], [target]), [(patch,) if name else ()], [0])
        assert found.nll == pytest.approx(alone.nll, abs=1e-4) and found.argmax == alone.argmax
    batch = lm.batch(lm.encode(PROMPTS))
    assert not PrefilledBatch.prefill(lm, batch, lm.plan([()], None, len(PROMPTS))).can_fork
    for (name, prompt), ids in answers.ids.items():
        assert lm.generate_ids([prompt], stacks=[(patch,) if name else ()]) == [list(ids)]


def test_training_runs_everything() -> None:
    """Going on from the prefix would give other numbers, silently."""
    lm = hybrid()
    rows = split_rows(lm.encode(PROMPTS, ["Rome"] * 4), 3, 0, lm.device)
    own = start(4, lm.width, "shared_logit", "pyreft", 2, lm.device)
    own["R"] = orthonormal(own.pop("X"))
    bank = Bank("subspace", Site(2), {"gate": "shared_logit", "last": 3}, {k: torch.stack([t] * 4) for k, t in own.items()})
    torch.testing.assert_close(Tail(lm, rows, 3).logits([bank]), FullForward(lm, rows, 3).logits([bank]), atol=1e-5, rtol=1e-5)
