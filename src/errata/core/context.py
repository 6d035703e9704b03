"""Text in front of the prompt: the ``context`` op, chosen row by row, and how a call of the model is widened for it.

A row [pad … BOS a b] with context x y becomes [pad … BOS x y a b]; rows with less context than the longest get padding in front, so
that the caller's tokens are the last T columns of every row and results are cut there.  Positions and masks follow.  Logits are those of
the base for the longer text, at the caller's places (BOS's place now stands for the last context token, which foretells the same token).

Ops at sites of the model see the longer rows; `errata.core.bank.ForwardContext` gives positions as the caller counts them, and -1 for
context as for padding: what acts on the last tokens of the prompt, or reads it, finds the caller's prompt as without context.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.core.context_schema import SCHEMA, names_of
from errata.core.embed import embed
from errata.core.families import Family, text_config
from errata.core.patch import Op
from errata.core.tokens import IGNORE_INDEX
from errata.errors import ModelError

Text = tuple[int, ...]


class ContextOp:
    """Registered as ``context``; its only site is `errata.core.patch.PROMPT`.

    tensors    texts [M, L] token ids padded on the right, lengths [M]; the first ``demonstrations`` of them are no facts
    settings   cue: token ids between the texts and the prompt; bos: the id that stays in front of everything, or None;
               budget: tokens of context at most, the newest facts first, then demonstrations
    retrieval  settings[``retrieval``] None: all texts.  Else {k, threshold, encoder, block, pool}, and tensors keys [K, D] (unit
               vectors) and owner [K], the text each key is of: the k texts nearest to the prompt whose cosine reaches the threshold,
               or nothing.  With names [M, N] (UTF-8, zeros behind) and named [M] bytes of each, a text is shown only to a prompt in
               which its name stands, whatever the case; 0 bytes: to any
    """

    schema = SCHEMA

    @staticmethod
    def non_causal(settings: Mapping[str, Any]) -> bool:
        return True  # where there is no telling yet whether and how much text is put in front, nothing can be computed apart

    @staticmethod
    def reads_prompt_end(settings: Mapping[str, Any]) -> bool:
        return settings["retrieval"] is not None


@dataclass(frozen=True)
class InsertedContext:
    """Context in the rows of one text: ``lengths`` [B] tokens of ``ids`` [B, C] before column ``column`` [B] of the caller's rows."""

    ids: Tensor
    lengths: Tensor
    column: Tensor

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def widen(self, x: Tensor, inner: Tensor, fill: int) -> Tensor:
        """[B, C + W] from the caller's ``x`` [B, W] and what stands at context tokens, ``inner`` [B, C]; padding is ``fill``."""
        width, extra = x.shape[1], self.width
        j = torch.arange(extra + width, device=x.device)[None]
        lead, column = (extra - self.lengths)[:, None], self.column[:, None]
        source = torch.cat([x, inner.to(x.dtype), x.new_full((len(x), 1), fill)], 1)
        own = torch.where(j < extra + column, width + j - lead - column, j - extra)
        index = torch.where(j < lead, width + extra, torch.where(j < lead + column, j - lead, own))
        return source.gather(1, index)

    @property
    def valid(self) -> Tensor:
        """[B, C] bool: tokens of ``ids`` that are context."""
        return torch.arange(self.width, device=self.ids.device) < self.lengths[:, None]


@dataclass
class ContextInserter:
    """The context ops of each stack, and the stack of each row (None: the only one)."""

    stacks: Sequence[Sequence[Op]]
    rows: Tensor | None
    tokenizer: Any
    placed: InsertedContext | None = None  # of the text that runs
    keep: int | None = None  # columns of this call's results that are the caller's
    fixed: dict[int, Text] = field(default_factory=dict)  # of stacks that choose nothing

    def __post_init__(self) -> None:
        for s, ops in enumerate(self.stacks):
            if s not in self.fixed and all(op.settings["retrieval"] is None for op in ops):
                self.fixed[s] = self._joined(ops, [None] * len(ops))

    def select(self, rows: Tensor) -> ContextInserter | None:
        """Of some rows of the text that runs; None where none of them has such an op and nothing was put in front."""
        which = None if self.rows is None else self.rows.to(rows.device)[rows]
        placed = self.placed and InsertedContext(self.placed.ids[rows], self.placed.lengths[rows], self.placed.column[rows])
        if placed is None and not any(self.stacks[s] for s in ([0] if which is None else which.tolist())):
            return None
        return ContextInserter(self.stacks, which, self.tokenizer, placed, None, self.fixed)

    @property
    def width(self) -> int:
        """Columns put in front of the text that runs."""
        return 0 if self.placed is None else self.placed.width

    def choose(self, hf: Any, family: Family, kwargs: Mapping[str, Any], position: Tensor, lengths: Tensor) -> None:
        """Choose the context of each row of a text that begins; ``position`` [B, T] and prompt ``lengths`` [B] as the caller counts."""
        self.placed = None
        ids = kwargs.get("input_ids")
        if ids is None:
            raise ModelError("a patch that puts text in front of the prompt needs input_ids, not inputs_embeds")
        which = [0] * len(ids) if self.rows is None else self.rows.tolist()
        chosen = self._choose(hf, family, ids, position, lengths, which)
        wide = max(map(len, chosen))
        if not wide:
            return
        padded = torch.tensor([[*text, *[0] * (wide - len(text))] for text in chosen], device=ids.device)
        first = (position >= 0).long().argmax(1)
        bos = torch.tensor([next((op.settings["bos"] for op in self.stacks[s] if op.settings["bos"] is not None), -1) for s in which])
        column = first + (ids.gather(1, first[:, None])[:, 0] == bos.to(ids.device)).long()
        self.placed = InsertedContext(padded, torch.tensor([len(text) for text in chosen], device=ids.device), column)

    def _choose(self, hf: Any, family: Family, ids: Tensor, position: Tensor, lengths: Tensor, which: Sequence[int]) -> list[Text]:
        """The context of each row; queries of like kind are embedded in one pass."""
        asking = [i for i, s in enumerate(which) if s not in self.fixed]
        picks: dict[int, list[list[int] | None]] = {i: [None] * len(self.stacks[which[i]]) for i in asking}
        members: dict[tuple[int, int], list[int]] = {}  # (stack, place of the op in it) -> rows
        for i in asking:
            for place, op in enumerate(self.stacks[which[i]]):
                if op.settings["retrieval"] is not None:
                    members.setdefault((which[i], place), []).append(i)
        vectors: dict[Any, Tensor] = {}
        for (s, place), rows in members.items():
            op = self.stacks[s][place]
            how = op.settings["retrieval"]
            name = how["encoder"], how["block"], how["pool"]
            if name not in vectors:
                some = torch.tensor(asking, device=ids.device)
                vectors[name] = embed(hf, family, self.tokenizer, ids[some], position[some], lengths[some], how)
            own = vectors[name][torch.tensor([asking.index(i) for i in rows], device=ids.device)]
            asked = self._words(ids, position, lengths, rows) if "names" in op.tensors else None
            for i, found in zip(rows, nearest(own, op, asked), strict=True):
                picks[i][place] = found
        return [self.fixed[s] if s in self.fixed else self._joined(self.stacks[s], picks[i]) for i, s in enumerate(which)]

    def _words(self, ids: Tensor, position: Tensor, lengths: Tensor, rows: Sequence[int]) -> list[str]:
        """The prompts of some rows as they were written: no space is tidied away, or a name that holds one would not be found."""
        inside = (position >= 0) & (position < lengths[:, None])
        return [self.tokenizer.decode(ids[i][inside[i]], clean_up_tokenization_spaces=False) for i in rows]

    def _joined(self, ops: Sequence[Op], picks: Sequence[list[int] | None]) -> Text:
        """The texts of a stack's ops in their order, as far as the last op's budget goes, and its cue; () where none is picked."""
        found: list[tuple[bool, Text]] = []  # (whether a demonstration, text)
        cue: Text = ()
        for op, pick in zip(ops, picks, strict=True):
            chosen = list(range(len(op.tensors["lengths"]))) if pick is None else pick
            if chosen:
                rows, lengths = op.tensors["texts"][chosen].tolist(), op.tensors["lengths"][chosen].tolist()
                shown = op.settings["demonstrations"]
                found += [(m < shown, tuple(row[:n])) for m, row, n in zip(chosen, rows, lengths, strict=True)]
                cue, budget = tuple(op.settings["cue"]), op.settings["budget"]
        if not found:
            return ()
        kept, left = set(), budget - len(cue)
        for demonstrations in (False, True):
            for n in reversed(range(len(found))):
                if found[n][0] is demonstrations:
                    if len(found[n][1]) > left:
                        break
                    left -= len(found[n][1])
                    kept.add(n)
        return (*(t for n in sorted(kept) for t in found[n][1]), *cue) if kept else ()

    def insert(self, hf: Any, kwargs: Mapping[str, Any], mask: Tensor, first: bool) -> dict[str, Any]:
        """The call's arguments with context in them.  ``mask`` [B, past + T] as the caller has it."""
        placed, self.keep = self.placed, None
        if placed is None:
            return dict(kwargs)
        out = _accepted(kwargs)
        ids = out["input_ids"]
        width, past = ids.shape[1], mask.shape[1] - ids.shape[1]
        at = out.get("position_ids")
        at = torch.arange(past, past + width, device=ids.device)[None] if at is None else at
        at = at.expand(len(ids), -1)
        out["attention_mask"] = placed.widen(mask, placed.valid, 0)
        if first:
            self.keep = width
            column = placed.column[:, None]
            start = at.gather(1, column.clamp_max(width - 1)) + (column == width).long()
            at = torch.where(torch.arange(width, device=ids.device) < column, at, at + placed.lengths[:, None])
            at = placed.widen(at, start + torch.arange(placed.width, device=ids.device), 0)
            out["input_ids"] = placed.widen(ids, placed.ids, 0)
            if out.get("labels") is not None:  # the loss counts the tokens it counts without context, which never is a row's first
                labels = out["labels"].clone()
                labels[:, 0] = IGNORE_INDEX
                out["labels"] = placed.widen(labels, torch.full_like(placed.ids, IGNORE_INDEX), IGNORE_INDEX)
            kept = out.get("logits_to_keep")
            if isinstance(kept, Tensor):
                out["logits_to_keep"] = kept + placed.width * (kept >= 0)
        else:
            at = at + placed.lengths[:, None]
        out["position_ids"] = at
        self._check(hf, placed, out["attention_mask"], at)
        return out

    def _check(self, hf: Any, placed: InsertedContext, mask: Tensor, at: Tensor) -> None:
        limit = getattr(text_config(hf.config), "max_position_embeddings", None)
        if not isinstance(limit, int) or mask.shape[1] <= limit or int(at.max()) < limit:
            return
        row = int(at.max(1).values.argmax())
        context = int(placed.lengths[row])
        raise ModelError(
            f"row {row}: {context} tokens of context and {int(mask[row].sum()) - context} of text do not fit the model's {limit} places; "
            "shorten the prompt, take patches off, or make the edit with a smaller budget"
        )

    def trim(self, output: Any) -> Any:
        """A model's results at the caller's columns only."""
        keep, self.keep = self.keep, None
        if keep is None:
            return output
        if not hasattr(output, "logits"):
            raise ModelError(
                "a patch that puts text in front of the prompt needs the model's results by name; call it with return_dict=True"
            )
        output.logits = output.logits[:, -keep:]
        for name, axis in (("hidden_states", 1), ("attentions", 2)):
            found = getattr(output, name, None)
            if found is not None:
                setattr(output, name, tuple(t.narrow(axis, t.shape[axis] - keep, keep) for t in found))
        return output


def name_bytes(names: Sequence[str | None]) -> dict[str, Tensor]:
    """A retrieval op's ``names`` [M, N] and ``named`` [M]; None: a text that is shown to any prompt."""
    rows = [(name or "").encode() for name in names]
    wide = max(map(len, rows), default=0)
    padded = torch.tensor([list(row.ljust(wide, b"\0")) for row in rows], dtype=torch.uint8).view(len(rows), wide)
    return {"names": padded, "named": torch.tensor([len(row) for row in rows], dtype=torch.long)}


def _names_in(texts: Sequence[str], op: Op) -> Tensor:
    """[B, M] bool: the texts of a retrieval op that may be shown to each prompt, by the names that stand in it."""
    names = names_of(op.tensors["names"], op.tensors["named"])
    return torch.tensor([[name in text for name in names] for text in map(str.casefold, texts)])


def nearest(queries: Tensor, op: Op, asked: Sequence[str] | None = None) -> list[list[int]]:
    """The texts that a retrieval op puts before each query [B, D], the nearest last.  What is NaN is near to nothing.

    ``asked``: the prompts [B] as text, where the op has names.
    """
    how, keys = op.settings["retrieval"], op.tensors["keys"].to(queries)
    owner = op.tensors["owner"].to(queries.device)
    count = len(op.tensors["lengths"])
    cosine = (queries @ keys.mT).nan_to_num(-2.0, -2.0, -2.0)
    best = cosine.new_full((len(queries), count), -2.0).scatter_reduce(1, owner.expand_as(cosine), cosine, "amax")
    if asked is not None:
        best = best.where(_names_in(asked, op).to(best.device), -2.0)
    values, texts = best.topk(min(how["k"], count))
    hits = values >= how["threshold"]
    return [[m for m, hit in zip(*row, strict=True) if hit][::-1] for row in zip(texts.tolist(), hits.tolist(), strict=True)]


def named(hf: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by their names."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(type(hf).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _accepted(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those the model finds again; `ModelError` for one that cannot be widened."""
    out = {k: v for k, v in kwargs.items() if k != "cache_position"}
    mask, at = out.get("attention_mask"), out.get("position_ids")
    wrong = None
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        wrong = "an attention_mask that is not [batch, tokens]"
    elif at is not None and at.ndim != 2:
        wrong = "position_ids that are not [batch, tokens]"
    elif out.get("return_dict") is False:
        wrong = "return_dict=False"
    else:
        known = ("input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep")
        shape = out["input_ids"].shape
        others = {k: v for k, v in out.items() if k not in known and isinstance(v, Tensor)}
        odd = [k for k, v in others.items() if v.shape[:2] == shape or k.endswith("_grid_thw")]  # of which the model makes positions
        wrong = odd[0] if odd else None
    if wrong is not None:
        raise ModelError(f"a patch that puts text in front of the prompt cannot run with {wrong}; leave it out, or take the patch off")
    return out
