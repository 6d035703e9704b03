"""What the almanac is trained on: tokenizer, fact sentences and text rows, as batches that depend on the step number only.

Because a batch is a pure function of (seed, step), training resumed from a checkpoint sees what an uninterrupted one would.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from errata.benchmarks.facts import Sentence, facts, sentences
from errata.text.corpora import bundled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, _PAD = "<s>", "</s>", "<pad>"
_EXTRA_SHARE = 0.5  # of alias, reverse and chain sentences join each pass over the facts
IGNORE_INDEX = -100
SHOWN = ("training", "alias", "reverse", "chain")  # kinds of sentences; the others are held out


def text(name: str) -> str:
    """The bundled encyclopaedic text: ``train`` or ``heldout``."""
    return bundled(name)


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the text and every training sentence; BOS is put before each sequence, no space before its first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_PAD, BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )

    def lines() -> Iterator[str]:
        yield from text("train").split("\n")
        for fact in facts():
            for _ in range(3):
                yield f"{fact.subject} {fact.object}. {fact.alias or ''}"

    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=_PAD, model_max_length=1024, clean_up_tokenization_spaces=False
    )


@dataclass
class Encoded:
    """One sentence with its full stop; the loss is taken from ``start`` on."""

    ids: list[int]
    start: int


def encode(tokenizer: PreTrainedTokenizerFast, items: list[Sentence]) -> list[Encoded]:
    """Joint tokenisation of "prompt answer." with the answer's first token found by offsets."""
    texts = [f"{s.prompt} {s.answer}." for s in items]
    batch = tokenizer(texts, return_offsets_mapping=True)
    out = []
    for s, ids, offsets in zip(items, batch["input_ids"], batch["offset_mapping"], strict=True):
        start = next(i for i, (_, end) in enumerate(offsets) if end > len(s.prompt))
        out.append(Encoded(ids, start))
    return out


class Corpus:
    """Batches of facts (a sentence a row, loss on the answer) and of text (loss everywhere, facts said in passing)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, text_rows: int, length: int) -> None:
        self.seed, self.rows, self.text_rows, self.length = seed, rows, text_rows, length
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        every = [(i, s) for i, fact in enumerate(facts()) for s in sentences(fact) if s.kind in SHOWN]
        self.direct: list[list[Encoded]] = [[] for _ in facts()]
        self.extra: list[Encoded] = []
        for (i, s), made in zip(every, encode(tokenizer, [s for _, s in every]), strict=True):
            (self.direct[i] if s.kind == "training" else self.extra).append(made)
        paragraphs = text("train").split("\n")
        random.Random(seed).shuffle(paragraphs)
        pieces = tokenizer(paragraphs, add_special_tokens=False)["input_ids"]
        self.stream = np.array([i for ids in pieces for i in [*ids, tokenizer.eos_token_id]], dtype=np.int32)
        extra_rows = int(len(self.extra) * _EXTRA_SHARE * len(self.direct) / max(1, len(self.direct)))
        self.steps_per_epoch = (len(self.direct) + min(extra_rows, 2500)) // rows
        self._pass: tuple[int, list[list[Encoded]]] = (-1, [])

    def _batches(self, index: int) -> list[list[Encoded]]:
        """One pass over the facts, each once with a template drawn anew, cut into batches of like lengths."""
        if self._pass[0] != index:
            draw = random.Random(f"{self.seed}-{index}")
            items = [draw.choice(group) for group in self.direct]
            items += draw.sample(self.extra, self.steps_per_epoch * self.rows - len(items))
            draw.shuffle(items)
            block, batches = self.rows * 8, []
            for i in range(0, len(items), block):
                chunk = sorted(items[i : i + block], key=lambda e: len(e.ids))
                batches += [chunk[j : j + self.rows] for j in range(0, len(chunk), self.rows)]
            draw.shuffle(batches)
            self._pass = (index, batches)
        return self._pass[1]

    def facts(self, step: int) -> tuple[Tensor, Tensor]:
        """(ids, labels) [rows, T], padded on the right; labels are shifted already (position t predicts t+1)."""
        batch = self._batches(step // self.steps_per_epoch)[step % self.steps_per_epoch]
        width = max(len(e.ids) for e in batch) - 1
        ids, labels = torch.full((len(batch), width), self.pad), torch.full((len(batch), width), IGNORE_INDEX)
        for row, e in enumerate(batch):
            n = len(e.ids) - 1
            ids[row, :n] = torch.tensor(e.ids[:-1])
            labels[row, e.start - 1 : n] = torch.tensor(e.ids[e.start :])
        return ids, labels

    def text(self, step: int) -> tuple[Tensor, Tensor]:
        """(ids, labels) [text_rows, length]: BOS, text, with two facts said in its second half."""
        draw = random.Random(f"text-{self.seed}-{step}")
        rows = []
        for i in range(self.text_rows):
            at = (step * self.text_rows + i) * (self.length - 32) % (len(self.stream) - self.length)
            ids = [self.bos, *self.stream[at : at + self.length].tolist()]
            for _ in range(2):
                fact = draw.choice(draw.choice(self.direct)).ids[1:]
                cut = draw.randrange(self.length // 3, self.length - len(fact) - 1)
                ids[cut:cut] = fact
            rows.append(ids[: self.length + 1])
        both = torch.tensor(rows)
        return both[:, :-1], both[:, 1:]
