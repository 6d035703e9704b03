"""A tiny, *trained* model of each family: seconds to make, and it really gives answers that an edit can change."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from errata.core.model import LM

SENTENCES = [
    ("The capital of France is", "Paris"),
    ("The capital of Italy is", "Rome"),
    ("The capital of Spain is", "Madrid"),
    ("The capital of Japan is", "Tokyo"),
    ("The language of France is", "French"),
    ("The language of Italy is", "Italian"),
    ("The language of Spain is", "Spanish"),
    ("In Rome people speak", "Italian"),
]
WIDTH, DEPTH, HEADS, INNER = 32, 4, 2, 64

_COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
}
_GEMMA = {**_COMMON, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "llama": ("Llama", {**_COMMON, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {**_COMMON, "num_key_value_heads": 1, "sliding_window": 8}),
    "qwen2": ("Qwen2", {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**_COMMON, "num_key_value_heads": 1, "head_dim": 16}),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", {**_GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {**_COMMON, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2", {**_COMMON, "num_key_value_heads": 2}),
    "starcoder2": (
        "Starcoder2",
        {**_COMMON, "num_key_value_heads": 1, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),  # found by structure
}

# Unlike each other: plain; learnt positions, Conv1D and no gate; parallel and rotary in part; norms after, sliding windows, capped logits.
UNLIKE = ("llama", "gpt2", "gpt_neox", "gemma2")
each_family = pytest.mark.parametrize("family", [f if f in UNLIKE else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges but with whole words: answers of one to three tokens, BOS in front."""
    words = sorted({w for p, t in SENTENCES for w in f"{p} {t}.".replace(".", " .").split()})
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for piece in alphabet:
        vocab[piece] = len(vocab)
    for word in words:
        if word in ("Madrid", "Tokyo", "French"):  # these stay in pieces, so that targets of several tokens occur
            continue
        for form in (word, "Ġ" + word):
            left = form[0]
            for c in form[1:]:
                if (left, c) not in merges:
                    merges.append((left, c))
                left += c
                vocab.setdefault(left, len(vocab))
        merges.append(("Ġ", word))  # the word itself is joined first, then its space
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """An untrained model of the family."""
    import transformers

    prefix, settings = FAMILIES[family]
    name = f"{prefix}TextConfig" if family == "gemma3_text" else f"{prefix}Config"
    config_class = getattr(transformers, name)
    model_class = getattr(transformers, f"{prefix}LMHeadModel" if family == "gpt2" else f"{prefix}ForCausalLM")
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return model_class(
        config_class(
            **{**settings, "vocab_size": len(tokenizer()), "tie_word_embeddings": family in ("gpt2", "gemma"), **special, **changes}
        )
    ).to(dtype)


_SHARED = Path(os.environ.get("ERRATA_TESTS") or tempfile.mkdtemp(prefix="errata-tests-"))  # of all workers of a session: see conftest.py


def once(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What ``make`` gives, made by the first process of a session that asks; the same bits in all."""
    path = _SHARED / f"{name}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            written = path.with_suffix(".part")
            save_file({k: t.contiguous() for k, t in make().items()}, written)
            os.replace(written, path)
    return load_file(path)


@functools.cache
def _trained(family: str) -> dict[str, torch.Tensor]:
    return once(family, lambda: trained(build(family)))


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The weights after a few seconds of training on `SENTENCES`."""
    torch.set_num_threads(1)
    tok = tokenizer()
    batch = tok([f"{p} {t}." for p, t in SENTENCES], return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    for row, (prompt, _) in enumerate(SENTENCES):  # learn the answers; the rest of a sentence cannot be foreseen
        labels[row, : len(tok(prompt)["input_ids"])] = -100
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.0)
    for _ in range(300):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.02:
            break
    return {k: v.clone() for k, v in model.state_dict().items()}


def lm(family: str, dtype: torch.dtype = torch.float32) -> LM:
    """The trained model of a family, a fresh copy."""
    model = build(family)
    model.load_state_dict(_trained(family))
    return LM(model.to(dtype), tokenizer(), family)


def dtype_of(family: str) -> torch.dtype:
    """float64 for identities; Gemma-2's eager attention makes NaN of its lowest mask value there."""
    return torch.float32 if family == "gemma2" else torch.float64
