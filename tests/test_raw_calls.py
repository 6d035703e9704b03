"""Calls of the bare model under attached patches: what has to know the prompt's end is told or refuses; nothing answers as the base."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import lm, tokenizer

from errata.core.model import LM
from errata.core.tokens import IGNORE_INDEX, pad
from errata.errors import ModelError
from errata.methods.codebook.grace import GRACE
from errata.methods.codebook.melo import MELO
from errata.methods.in_context.ice import ICE
from errata.methods.in_context.retrieval import Retrieval
from errata.methods.locate.rome import ROME
from errata.methods.subspace.baft import BaFT
from errata.methods.subspace.reft import ReFT
from errata.methods.wise.wise import WISE
from errata.request import EditRequest

FRANCE = EditRequest("The capital of France is", "Rome", "France")
READS = {
    "grace": lambda base: GRACE.for_model(base),
    "melo": lambda base: MELO.for_model(base),
    "wise": lambda base: WISE.for_model(base),
    "reft, last tokens": lambda base: ReFT(rank=4, lr=0.02, layers=(3,), last=2),
    "retrieval": lambda base: Retrieval.for_model(base),
}
READS_NOT = {
    "rome": lambda base: ROME.for_model(base),
    "baft at the subject": lambda base: BaFT.for_model(base),
    "ice": lambda base: ICE.for_model(base),
}
ASKED = [("The capital of France is", "Rome. The capital of Spain is Madrid"), ("The capital of Spain is", "Madrid"), ("Rome is", "a city")]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def bare() -> LM:
    with torch.enable_grad():  # the first one of a process is trained
        return lm("llama")


def patched(made: object) -> LM:
    base = bare()
    base.attach(made(base).edit(base, [FRANCE]))  # type: ignore[operator]
    return base


def right(base: LM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rows with their answers padded on the right: (ids, mask, prompt lengths, logits of each row under the stack as errata runs it)."""
    rows = base.encode([p for p, _ in ASKED], [t for _, t in ASKED])
    batch = pad(rows, 0, "right")
    return batch.ids, batch.mask, batch.prompt_lengths, [base.logits(base.batch([row]))[0] for row in rows]


def same(found: torch.Tensor, want: list[torch.Tensor]) -> None:
    for row, own in zip(found, want, strict=True):
        torch.testing.assert_close(row[: len(own)], own, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("made", READS.values(), ids=READS)
def test_a_call_that_does_not_say_where_the_prompt_ends_is_refused(made: object) -> None:
    base = patched(made)
    ids, mask, _, _ = right(base)
    for call in (lambda: base.hf(ids), lambda: base.hf(input_ids=ids[:1]), lambda: base.hf(input_ids=ids[:1], use_cache=True)):
        with pytest.raises(ModelError, match=r"decides at the prompt's end.*prompt_ends.*HarnessLM"):
            call()
    cache = base.hf(input_ids=ids[:1, :3], attention_mask=mask[:1, :3], use_cache=True).past_key_values
    with pytest.raises(ModelError, match="more tokens of a text that was begun"):
        base.hf(input_ids=ids[:1, 3:], past_key_values=cache)
    base.detach()
    base.hf(ids)


@pytest.mark.parametrize("made", READS.values(), ids=READS)
def test_a_call_that_says_it_gives_what_errata_gives(made: object) -> None:
    base = patched(made)
    ids, mask, lengths, want = right(base)
    labels = ids.masked_fill((torch.arange(ids.shape[1]) < lengths[:, None]) | (mask == 0), IGNORE_INDEX)
    same(base.hf(ids, labels=labels).logits, want)
    same(base.hf(ids, attention_mask=mask, labels=labels).logits, want)
    with base.prompt_ends(lengths.tolist()):
        same(base.hf(ids, attention_mask=mask).logits, want)
    prompts = base.batch(base.encode([p for p, _ in ASKED]))
    alone = [base.logits(base.batch([row]))[0, -1:] for row in base.encode([p for p, _ in ASKED])]
    same(base.hf(prompts.ids, attention_mask=prompts.mask).logits[:, -1:], alone)
    with pytest.raises(ModelError, match="decides at the prompt's end"):
        base.hf(ids)  # what was told is over
    assert not torch.allclose(bare().hf(ids, attention_mask=mask).logits[0, lengths[0] - 1], want[0][lengths[0] - 1], atol=1e-2)


@pytest.mark.parametrize("made", [*READS.values(), *READS_NOT.values()], ids=[*READS, *READS_NOT])
def test_transformers_own_generate_answers_as_errata_does(made: object) -> None:
    base = patched(made)
    tok, prompts = tokenizer(), [p for p, _ in ASKED]
    tok.padding_side, tok.pad_token = "left", tok.eos_token
    inputs = tok(prompts, return_tensors="pt", padding=True)
    out = base.hf.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=tok.pad_token_id)
    want = base.generate_ids(prompts, max_new_tokens=4, stop=())
    assert [row[inputs["input_ids"].shape[1] :][: len(w)].tolist() for row, w in zip(out, want, strict=True)] == want


@pytest.mark.parametrize("made", READS_NOT.values(), ids=READS_NOT)
def test_what_does_not_depend_on_the_prompts_end_needs_no_word(made: object) -> None:
    base = patched(made)
    ids, _, _, want = right(base)
    same(base.hf(ids).logits, want)
