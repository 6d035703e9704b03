"""The only place where text becomes ids.

Prompt and target are tokenised **together, once**; where the target begins is read off the character offsets.  Two
tokenisations joined afterwards differ from one whenever a token would cross the seam (SentencePiece's dummy space,
byte-level BPE merges), and then a model is trained on a text it never sees at use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import InputError

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one text; ``prompt_length`` tokens of it are prompt, the rest is target."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows: ids and mask [B, T], prompt lengths [B] in unpadded coordinates."""

    ids: Tensor
    mask: Tensor
    prompt_lengths: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device), self.prompt_lengths.to(device))


def join(prompt: str, target: str, separator: str = " ") -> tuple[str, int]:
    """(text, character where the prompt ends): trailing space of the prompt and leading space of the target become one ``separator``."""
    prompt, target = prompt.rstrip(), target.strip()
    if not prompt:
        raise InputError("the prompt is empty; give at least one word")
    if not target:
        raise InputError(f"the target of prompt {prompt!r} is empty; give the new answer")
    return f"{prompt}{separator}{target}", len(prompt)


def apply_chat_template(tokenizer: Any, prompt: str) -> str:
    """The prompt as the user's turn of the tokenizer's chat template, ready for the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this tokenizer has no chat template; leave chat off")
    return str(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))


def encode(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str] | None = None, *, chat: bool = False, separator: str = " "
) -> list[Encoded]:
    """Tokenise prompts, or prompts with targets in one piece.

    ``chat``: wrap each prompt in the tokenizer's chat template (which brings its own special tokens, so none are added).
    """
    if not prompts:
        return []
    if chat:
        prompts, separator = [apply_chat_template(tokenizer, p) for p in prompts], ""
    if targets is None:
        ids = tokenizer([p if chat else p.rstrip() for p in prompts], add_special_tokens=not chat)["input_ids"]
        return [_whole(tokenizer, p, row) for p, row in zip(prompts, ids, strict=True)]
    if chat:  # the template's own trailing whitespace is part of it
        joined = [(p + join(p, t)[0][len(p.rstrip()) + 1 :], len(p)) for p, t in zip(prompts, targets, strict=True)]
    else:
        joined = [join(p, t, separator) for p, t in zip(prompts, targets, strict=True)]
    texts = [text for text, _ in joined]
    if not tokenizer.is_fast:
        return [_by_prefix(tokenizer, text, seam, chat) for text, seam in joined]
    found = tokenizer(texts, add_special_tokens=not chat, return_offsets_mapping=True, return_special_tokens_mask=True)
    out = []
    for (text, seam), row, offsets, special in zip(
        joined, found["input_ids"], found["offset_mapping"], found["special_tokens_mask"], strict=True
    ):
        end = len(row)
        while end and special[end - 1] and offsets[end - 1][1] == 0:  # an EOS the tokenizer puts after every text
            end -= 1
        start = next((i for i in range(end) if offsets[i][1] > seam), end)
        if start == end or start == 0:
            raise InputError(f"{text!r} leaves no token for the {'target' if start else 'prompt'}")
        out.append(Encoded(tuple(row[:end]), start))
    return out


def _whole(tokenizer: Any, prompt: str, row: Sequence[int]) -> Encoded:
    ids = tuple(row)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise InputError(f"prompt {prompt!r} has no token")
    return Encoded(ids, len(ids))


def _by_prefix(tokenizer: Any, text: str, seam: int, chat: bool) -> Encoded:
    """A tokenizer without offsets: the prompt is what both tokenisations share."""
    both, alone = (tokenizer(t, add_special_tokens=not chat)["input_ids"] for t in (text, text[:seam]))
    start = next((i for i, (a, b) in enumerate(zip(both, alone, strict=False)) if a != b), min(len(both), len(alone)))
    if start in (0, len(both)):
        raise InputError(f"{text!r} leaves no token for the target")
    return Encoded(tuple(both), start)


def pieces(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids of texts that will stand before other text, without special tokens.

    Where the tokenizer itself puts a space before a text's first word (SentencePiece), a text's last space is left to what follows.
    """
    first = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])[:1]
    spaced = bool(first) and first[0].startswith(("▁", "Ġ"))
    return [tuple(tokenizer(t.rstrip(" ") if spaced else t, add_special_tokens=False)["input_ids"]) if t else () for t in texts]


def subject_span(tokenizer: Any, prompt: str, subject: str, *, last: bool = False) -> tuple[int, int]:
    """Token range [start, end) of the subject's first (or last) occurrence in the prompt, by character offsets."""
    prompt = prompt.rstrip()
    begin = prompt.rfind(subject) if last else prompt.find(subject)
    if begin < 0:
        raise InputError(f"subject {subject!r} does not occur in prompt {prompt!r}")
    if not tokenizer.is_fast:
        raise InputError("subject positions need a fast tokenizer (with offsets)")
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if b > begin and a < begin + len(subject) and b > a]
    if not inside:  # a normaliser may drop characters
        raise InputError(f"subject {subject!r} leaves no token in prompt {prompt!r}; give more of its name")
    return inside[0], inside[-1] + 1


def pad_id(tokenizer: Any) -> int:
    """Any id will do where the mask is zero; the tokenizer's own, else EOS, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def positions(mask: Tensor) -> Tensor:
    """[B, T] the place of each token in its row, -1 where the mask is zero."""
    return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)


def pad(rows: Sequence[Encoded], fill: int, side: str = "left") -> Batch:
    """Pad rows to the longest.  Masks come from lengths, never from ids: padding may equal EOS and EOS may be text."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        where = slice(width - n, width) if side == "left" else slice(0, n)
        ids[i, where] = torch.tensor(row.ids)
        mask[i, where] = 1
    return Batch(ids, mask, torch.tensor([r.prompt_length for r in rows]))
