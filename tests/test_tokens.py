"""Prompt and target in one tokenisation, with real byte-level BPE and SentencePiece tokenizers where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from families import tokenizer as tiny

from errata.core.tokens import encode, join, pad, subject_span
from errata.errors import InputError

CASES = [
    ("The capital of France is", "Lyon", "France"),
    ("The capital of France is ", " Lyon", "France"),
    ("¿Dónde está 東京? Está en", "el Japón", "東京"),
    ("She said: \"it's", 'over"', "it's"),
    ("x", "y", "x"),
    ("In 1999 the euro was", "1.5 dollars", "the euro"),
]


def sentencepiece(tmp: Path):  # type: ignore[no-untyped-def]
    """A real SentencePiece-style tokenizer: Unigram with Metaspace, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    text = [f"{p} {t}" for p, t, _ in CASES] + ["the capital of Lyon and the language of France is over there"]
    inner.train_from_iterator(text * 5, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prefix_space():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [p for p, _, _ in CASES] * 9, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def tokenizers(tmp_path: Path) -> dict:
    out = {
        "byte-level with BOS": tiny(),
        "byte-level with prefix space, no BOS": prefix_space(),
        "unigram with BOS and EOS": sentencepiece(tmp_path),
    }
    data = os.environ.get("ERRATA_DATA")  # a folder with real tokenizers: gpt2, gptneox-pythia, llama2
    if data:
        from transformers import GPT2TokenizerFast, LlamaTokenizer, PreTrainedTokenizerFast

        out["gpt2"] = GPT2TokenizerFast.from_pretrained(f"{data}/tokenizers/gpt2")
        out["llama2"] = LlamaTokenizer.from_pretrained(f"{data}/tokenizers/llama2")
        out["neox"] = PreTrainedTokenizerFast(tokenizer_file=f"{data}/tokenizers/gptneox-pythia/tokenizer.json")
    return out


@pytest.mark.parametrize(("prompt", "target", "subject"), CASES)
def test_joint_tokenisation_splits_where_the_target_begins(prompt: str, target: str, subject: str, tmp_path: Path) -> None:
    for name, tok in tokenizers(tmp_path).items():
        (row,) = encode(tok, [prompt], [target])
        text, seam = join(prompt, target)
        whole = list(tok(text)["input_ids"])
        assert list(row.ids) == [i for n, i in enumerate(whole) if n < len(row.ids)], name
        said = tok.decode(row.target, skip_special_tokens=True).strip()
        if "unigram" not in name:  # unknown characters of the small unigram are lost in decoding
            assert said == target.strip(), name
        assert tok.eos_token_id is None or row.ids[-1] != tok.eos_token_id
        start, end = subject_span(tok, prompt, subject)
        assert 0 <= start < end <= row.prompt_length, name
        offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
        assert all(b <= seam for _, b in offsets[: row.prompt_length]), name


def test_a_prompt_alone_has_the_same_ids_as_in_front_of_its_target() -> None:
    (alone,), (both,) = encode(tiny(), ["The capital of France is"]), encode(tiny(), ["The capital of France is"], ["Madrid"])
    assert alone.ids == both.ids[: both.prompt_length] and alone.prompt_length == both.prompt_length


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_looks_at_ids(side: str) -> None:
    rows = encode(tiny(), ["The capital of France is", "In Rome"])
    batch = pad(rows, rows[0].ids[2], side)  # pad with an id that occurs in the text
    assert batch.mask.sum(1).tolist() == [len(r.ids) for r in rows]
    for i, row in enumerate(rows):
        assert batch.ids[i][batch.mask[i].bool()].tolist() == list(row.ids)
    assert torch.equal(batch.prompt_lengths, torch.tensor([len(r.ids) for r in rows]))


def test_chat_template() -> None:
    tok = tiny().__class__(tokenizer_object=tiny().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    with pytest.raises(InputError, match="no chat template"):
        encode(tok, ["Hi"], chat=True)
    tok.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[answer] "
    (row,) = encode(tok, ["The capital of France is"], ["Rome"], chat=True)
    assert tok.decode(row.target) == " Rome"  # the template's trailing space and the answer are one token
    assert tok.decode(row.ids[: row.prompt_length]) == "<s>[user] The capital of France is[answer]"
    assert row.ids.count(tok.bos_token_id) == 1


@pytest.mark.parametrize(("prompt", "target"), [("", "x"), ("  ", "x"), ("x", ""), ("x", "  ")])
def test_empty_texts(prompt: str, target: str) -> None:
    with pytest.raises(InputError, match="empty"):
        encode(tiny(), [prompt], [target])


def test_subject_that_is_not_there() -> None:
    with pytest.raises(InputError, match="does not occur"):
        subject_span(tiny(), "The capital of France is", "Spain")
    assert subject_span(tiny(), "Rome and Rome", "Rome", occurrence=-1)[0] > subject_span(tiny(), "Rome and Rome", "Rome")[0]
