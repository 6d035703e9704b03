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

from errata.core.chat import apply_chat_template, is_exact, is_rendered
from errata.errors import InputError
from errata.subjects import places, spell
from errata.writing import NO_SPACE, seam

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


def join(prompt: str, target: str) -> tuple[str, int]:
    """(text, character where the prompt ends): the two as one writes them (`errata.writing.seam`).

    Space at the prompt's end or the target's beginning is one space; a target that begins with `NO_SPACE` follows at once.
    """
    given = " " if prompt[-1:].isspace() or target[:1].isspace() else "" if target[:1] == NO_SPACE else None
    prompt, target = prompt.rstrip(), target.lstrip(NO_SPACE).strip()
    if not prompt:
        raise InputError("the prompt is empty; give at least one word")
    if not target:
        raise InputError(f"the target of prompt {prompt!r} is empty; give the new answer")
    return f"{prompt}{seam(prompt, target) if given is None else given}{target}", len(prompt)


def trim(tokenizer: Any, prompt: str) -> str:
    """The prompt as it is tokenised: without trailing whitespace, but for one that is tokenised as it stands (`chat.is_exact`)."""
    return prompt if is_exact(tokenizer, prompt) else prompt.rstrip()


def joined(tokenizer: Any, prompt: str, target: str, chat: bool = False) -> tuple[str, int]:
    """`join`, but a prompt that is tokenised as it stands keeps its whitespace, which then is what stands between; a chat has none."""
    text, end = join(prompt, target)
    chat = chat or is_rendered(tokenizer, prompt)
    if not (chat or is_exact(tokenizer, prompt)):
        return text, end
    behind = text[end:].lstrip() if chat or prompt[-1:].isspace() else text[end:]
    return f"{prompt}{behind}", len(prompt)


def encode(tokenizer: Any, prompts: Sequence[str], targets: Sequence[str] | None = None, *, chat: bool = False) -> list[Encoded]:
    """Tokenise prompts, or prompts with targets in one piece.

    ``chat``: wrap each prompt in the tokenizer's chat template (which brings its own special tokens, so none are added).  A prompt that is
    wrapped already, or begins with BOS, is tokenised as it stands: nothing is added, nothing is trimmed.
    """
    if not prompts:
        return []
    if chat:
        prompts = [apply_chat_template(tokenizer, p) for p in prompts]
    exact = [chat or is_exact(tokenizer, p) for p in prompts]
    if targets is None:
        texts = [p if own else p.rstrip() for p, own in zip(prompts, exact, strict=True)]
        ids = _tokenise(tokenizer, texts, exact, "input_ids")
        return [_whole(tokenizer, p, row, own) for p, (row,), own in zip(prompts, ids, exact, strict=True)]
    pairs = [joined(tokenizer, p, t, chat) for p, t in zip(prompts, targets, strict=True)]
    if not tokenizer.is_fast:
        return [_by_prefix(tokenizer, text, end, own) for (text, end), own in zip(pairs, exact, strict=True)]
    keys = ("input_ids", "offset_mapping", "special_tokens_mask")
    found = _tokenise(tokenizer, [text for text, _ in pairs], exact, *keys, return_offsets_mapping=True, return_special_tokens_mask=True)
    out = []
    for (text, behind), (row, spans, special) in zip(pairs, found, strict=True):
        end = len(row)
        while end and special[end - 1] and spans[end - 1][1] == 0:  # an EOS the tokenizer puts after every text
            end -= 1
        start = next((i for i in range(end) if spans[i][1] > behind), end)
        if start == end or start == 0:
            raise InputError(f"{text!r} leaves no token for the {'target' if start else 'prompt'}")
        out.append(Encoded(tuple(row[:end]), start))
    return out


def offsets(tokenizer: Any, prompts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """For each prompt the characters [start, end) of the tokens that `encode` gives it (and of the EOS that some tokenizers add)."""
    exact = [is_exact(tokenizer, p) for p in prompts]
    texts = [p if own else p.rstrip() for p, own in zip(prompts, exact, strict=True)]
    return [row for (row,) in _tokenise(tokenizer, texts, exact, "offset_mapping", return_offsets_mapping=True)]


def _tokenise(tokenizer: Any, texts: Sequence[str], exact: Sequence[bool], *keys: str, **how: Any) -> list[tuple[Any, ...]]:
    """For each text what the tokenizer says under ``keys``, with its special tokens added where the text is not exact."""
    out: list[tuple[Any, ...]] = [()] * len(texts)
    for own in (False, True):
        places = [i for i, e in enumerate(exact) if e == own]
        if places:
            found = tokenizer([texts[i] for i in places], add_special_tokens=not own, **how)
            for i, values in zip(places, zip(*(found[k] for k in keys), strict=True), strict=True):
                out[i] = values
    return out


def _whole(tokenizer: Any, prompt: str, row: Sequence[int], exact: bool) -> Encoded:
    ids = tuple(row)
    if not exact and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise InputError(f"prompt {prompt!r} has no token")
    return Encoded(ids, len(ids))


def _by_prefix(tokenizer: Any, text: str, end: int, exact: bool) -> Encoded:
    """A tokenizer without offsets: the prompt is what both tokenisations share."""
    both, alone = (tokenizer(t, add_special_tokens=not exact)["input_ids"] for t in (text, text[:end]))
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


def subject_spans(tokenizer: Any, prompt: str, subject: str, *, parts: bool = False) -> list[tuple[int, int]]:
    """Token ranges [start, end) of the subject's `errata.subjects.places` in the prompt, one at least, by character offsets."""
    prompt = trim(tokenizer, prompt)
    found = places(prompt, subject, parts=parts) or places(prompt, subject := spell(prompt, subject))
    if not tokenizer.is_fast:
        raise InputError("subject positions need a fast tokenizer (with offsets)")
    (tokens,) = offsets(tokenizer, [prompt])
    out = []
    for begin, end in found:
        inside = [i for i, (a, b) in enumerate(tokens) if b > begin and a < end and b > a]
        if not inside:  # a normaliser may drop characters
            raise InputError(f"subject {subject!r} leaves no token in prompt {prompt!r}; give more of its name")
        out.append((inside[0], inside[-1] + 1))
    return out


def subject_span(tokenizer: Any, prompt: str, subject: str, *, occurrence: int = 1) -> tuple[int, int]:
    """Token range [start, end) of the subject's first occurrence in the prompt, of another by number, or of the last one (-1)."""
    return subject_spans(tokenizer, prompt, subject)[occurrence - 1 if occurrence > 0 else occurrence]


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
