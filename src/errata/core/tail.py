"""`Tail`: run the frozen part of a batch once, the part an edit can change many times.

Causal attention means that no position before the first intervened one, and no block below the first intervened one,
can change.  So once per batch: the prefix through all blocks (its keys and values are kept), and the active tokens
through the lower blocks (the hidden states that enter the first touched block are kept).  Then each optimisation step
runs only the active tokens through the upper blocks.  The logits are those of the full forward pass.

`FullForward` has the same interface and runs everything every time: it is what the tail is tested and timed against.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from errata.core.bank import Bank, Plan, Stack, non_causal
from errata.core.decode import can_fork, fork, select_cache_rows
from errata.core.families import hidden_of, with_hidden
from errata.core.forward import StopForward, hooks_disabled
from errata.core.model import LM
from errata.core.tokens import IGNORE_INDEX, Encoded

_SAME = 0.05  # of the largest logit: what rounding may move one by in any dtype


@dataclass
class SplitRows:
    """Rows cut at their first active token.

    prefix [B, S] padded on the left, active [B, A] padded on the right, mask [B, S + A]; labels [B, A] hold at each
    position the target token it should predict, else IGNORE_INDEX.
    """

    prefix: Tensor
    active: Tensor
    mask: Tensor
    labels: Tensor
    prompt_lengths: Tensor

    @property
    def label_mask(self) -> Tensor:
        """[B, A]: positions that should predict a target token."""
        return self.labels != IGNORE_INDEX

    @property
    def valid(self) -> Tensor:
        """[B, A]: active tokens that are not padding."""
        return self.mask[:, self.prefix.shape[1] :].bool()

    def select(self, rows: Tensor) -> SplitRows:
        return SplitRows(self.prefix[rows], self.active[rows], self.mask[rows], self.labels[rows], self.prompt_lengths[rows])


def split_rows(encoded: Sequence[Encoded], last: int, fill: int, device: torch.device, final: bool = True) -> SplitRows:
    """Cut each row ``last`` tokens before the end of its prompt (fewer where the prompt is shorter)."""
    return split_rows_at(encoded, [max(0, e.prompt_length - last) for e in encoded], fill, device, final)


def split_rows_at(encoded: Sequence[Encoded], starts: Sequence[int], fill: int, device: torch.device, final: bool = True) -> SplitRows:
    """Cut row i at its token ``starts[i]``, the first that an edit may change.

    ``final``: keep the target's last token, which predicts nothing; only a loss that looks at states there needs it.
    """
    width = [len(e.ids) - (not final and bool(e.target)) for e in encoded]
    wide, long = max(starts), max(w - s for w, s in zip(width, starts, strict=True))
    prefix, active = torch.full((len(encoded), wide), fill), torch.full((len(encoded), long), fill)
    mask, labels = torch.zeros((len(encoded), wide + long), dtype=torch.long), torch.full((len(encoded), long), IGNORE_INDEX)
    for i, (e, s) in enumerate(zip(encoded, starts, strict=True)):
        prefix[i, wide - s :] = torch.tensor(e.ids[:s], dtype=torch.long)
        n = width[i] - s
        active[i, :n] = torch.tensor(e.ids[s : width[i]])
        mask[i, wide - s : wide + n] = 1
        labels[i, e.prompt_length - s - 1 : len(e.ids) - s - 1] = torch.tensor(e.target, dtype=torch.long)
    lengths = torch.tensor([e.prompt_length for e in encoded])
    return SplitRows(*(t.to(device) for t in (prefix, active, mask, labels, lengths)))


def join_rows(first: SplitRows, second: SplitRows, fill: int) -> SplitRows:
    """The rows of both, one after the other, in one batch; ``fill`` is the token of the padding."""
    both = (first, second)
    wide, long = max(own.prefix.shape[1] for own in both), max(own.active.shape[1] for own in both)

    def joined(name: str, left: bool, right: bool, value: int) -> Tensor:
        out = []
        for own in both:
            more = (wide - own.prefix.shape[1]) * left, (long - own.active.shape[1]) * right
            out.append(functional.pad(getattr(own, name), more, value=value))
        return torch.cat(out)

    return SplitRows(
        joined("prefix", True, False, fill), joined("active", False, True, fill), joined("mask", True, True, 0),
        joined("labels", False, True, IGNORE_INDEX), torch.cat([own.prompt_lengths for own in both]),
    )  # fmt: skip


class Runner(Protocol):
    """Logits [M, V] at the M labelled positions of the active tokens (row by row) under given banks."""

    rows: SplitRows

    def logits(self, banks: Sequence[Bank], recorded: dict[Any, Tensor] | None = None) -> Tensor: ...
    def select(self, rows: Tensor) -> Runner: ...


def _under(lm: LM, on: Stack, rows: SplitRows) -> Plan:
    """The frozen stack, compiled once."""
    return lm.plan([on], None, len(rows.active))


def _plan(under: Plan, rows: SplitRows, banks: Sequence[Bank], recorded: dict[Any, Tensor] | None) -> Plan:
    plan = Plan({site: list(own) for site, own in under.banks.items()}, rows.prompt_lengths, recorded, inserter=under.inserter)
    for bank in banks:
        plan.add(bank)
    return plan


class FullForward:
    """Everything, every time."""

    def __init__(self, lm: LM, rows: SplitRows, first_block: int = 0, on: Stack = ()) -> None:
        self.lm, self.rows, self.on = lm, rows, on
        self.under = _under(lm, on, rows)

    def logits(self, banks: Sequence[Bank], recorded: dict[Any, Tensor] | None = None) -> Tensor:
        """[M, V]; gradients flow to the banks' parameters."""
        ids, wide = torch.cat([self.rows.prefix, self.rows.active], 1), self.rows.prefix.shape[1]
        with self.lm.running(_plan(self.under, self.rows, banks, recorded)):
            out: Tensor = self.lm.forward(ids, self.rows.mask, use_cache=False).logits[:, wide:]
        for key, noted in (recorded or {}).items():
            recorded[key] = noted[:, -self.rows.active.shape[1] :]  # type: ignore[index]  # counted from the end: context may stand in front
        return out[self.rows.label_mask]

    def select(self, rows: Tensor) -> FullForward:
        return FullForward(self.lm, self.rows.select(rows), 0, self.on)


class Tail:
    """The frozen part once (in the constructor), the active part in `logits`.

    ``first_block``: the first block that has to compute; banks given to `logits` touch it, blocks above, or the *output* of the
    block before it.  ``on``: patches that run underneath, frozen.  Kept are the prefix's keys and values and one hidden state a token.
    Under a patch that is `non_causal` the prefix is not frozen, and what a model keeps as a running state (`errata.core.decode.can_fork`)
    cannot be gone on from again and again: then everything runs every time (`FullForward`).  So it does where blocks hand on more than
    hidden states, as Gemma 3n's do keys; in families that are not known by name a trial finds out.
    """

    def __init__(self, lm: LM, rows: SplitRows, first_block: int = 0, on: Stack = ()) -> None:
        self.lm, self.rows, self.on, self.first = lm, rows, on, first_block
        self.cache: Any = None
        self.whole = FullForward(lm, rows, 0, on) if non_causal(on) or not splits(lm, first_block) else None
        if self.whole is not None:
            return
        self._freeze()

    def _freeze(self) -> None:
        lm, rows, on = self.lm, self.rows, self.on
        self.under = _under(lm, on, rows)
        with torch.no_grad(), lm.running(_plan(self.under, rows, (), None)):
            wide = rows.prefix.shape[1]
            if wide:
                # a row without a prefix has an all-masked left part, which its active tokens never attend to
                out = lm.forward(rows.prefix, rows.mask[:, :wide], use_cache=True, **lm.last_logits_kwargs)
                self.cache = out.past_key_values
                if not can_fork(self.cache):
                    self.whole = FullForward(lm, rows, 0, on)
                    return
            self.hidden, self.like = self._enter()

    def _enter(self) -> tuple[Tensor, Any]:
        """The hidden states [B, A, D] that leave the last frozen block, before any op at its output, and an output of its form."""
        seen: dict[str, Any] = {}

        def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]
            raise StopForward

        def leaves(_: Any, __: Any, output: Any) -> None:
            seen["like"], seen["hidden"] = empty_like(output), hidden_of(output)
            raise StopForward

        blocks = self.lm.blocks
        if self.first == 0:
            handle = blocks[0].register_forward_pre_hook(enters, with_kwargs=True)
        else:
            handle = blocks[self.first - 1].register_forward_hook(
                leaves, prepend=True
            )  # the frozen stack's ops at this block run later, again
        try:
            self._forward()
        except StopForward:
            pass
        finally:
            handle.remove()
        return seen["hidden"].detach(), seen.get("like")

    def _forward(self) -> Any:
        more: dict[str, Any] = {"use_cache": False}
        if self.cache is not None:
            more = {"past_key_values": fork(self.cache), "use_cache": True}
        return self.lm.forward(self.rows.active, self.rows.mask, **more)

    def logits(self, banks: Sequence[Bank], recorded: dict[Any, Tensor] | None = None) -> Tensor:
        """[M, V]; gradients flow to the banks' parameters."""
        if self.whole is not None:
            return self.whole.logits(banks, recorded)
        where = self.rows.label_mask

        def pick(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # what comes after the head (soft caps, scales) acts on each number alone, so it may see the picked positions only
            return (args[0][where].unsqueeze(0), *args[1:])

        head = self.lm.hf.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            frozen = self.lm.blocks[: self.first]
            with self.lm.running(_plan(self.under, self.rows, banks, recorded)), skip_blocks(frozen, self.hidden, self.like):
                out: Tensor = self._forward().logits.flatten(0, 1)  # a view; taking [0] would cost a zeroed copy on the way back
        finally:
            head.remove()
        return out

    def select(self, rows: Tensor) -> Tail:
        """The tail of some rows only."""
        other = copy.copy(self)
        other.rows = self.rows.select(rows)
        if self.whole is not None:
            other.whole = self.whole.select(rows)
            return other
        other.hidden = self.hidden[rows]
        if self.cache is not None:
            other.cache = select_cache_rows(self.cache, rows)
        return other


def empty_like(output: Any) -> Any:
    """What a block gave back with nothing in it: None, or so many of them in a tuple or list."""
    return type(output)([None] * len(output)) if isinstance(output, tuple | list) else None


def splits(lm: LM, first: int) -> bool:
    """Whether this model can be run in two parts, the blocks below ``first`` once: found by trying, on a few tokens of the bare base."""
    if lm.family.found == "table":
        return True
    if ("splits", first) not in lm.base_cache:
        lm.base_cache["splits", first] = _try_split(lm, first, 2) and _try_split(lm, first, 0)
    return bool(lm.base_cache["splits", first])


@torch.no_grad()
def _try_split(lm: LM, first: int, prefix: int) -> bool:
    """``prefix``: tokens of it; without any there is no cache either."""
    rows = split_rows_at([Encoded((1, 2, 3, 4, 5), 4), Encoded((5, 4, 3, 2, 1), 3)], [prefix] * 2, 0, lm.device)
    whole, part = FullForward(lm, rows), Tail.__new__(Tail)
    part.lm, part.rows, part.on, part.first, part.cache, part.whole = lm, rows, (), first, None, None
    with hooks_disabled(lm.hf):
        wanted = whole.logits([])
        try:
            part._freeze()
            found = part.logits([])
        except Exception:  # whatever a model stumbles over that is run in a way it was not written for
            return False
    return found.shape == wanted.shape and bool((found - wanted).abs().max() < _SAME * wanted.abs().max())


@contextmanager
def skip_blocks(blocks: Sequence[Any], hidden: Tensor, like: Any) -> Iterator[None]:
    """These first blocks compute nothing: the last of them returns ``hidden`` (its hooks still run), in the form of ``like``."""

    def returns(stored: Tensor | None) -> Any:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden_states if stored is None else stored
            return with_hidden(like, out)

        return forward

    own = [b.__dict__.get("forward") for b in blocks]  # device_map keeps its wrapper in the instance
    try:
        for i, block in enumerate(blocks, 1):
            block.__dict__["forward"] = returns(hidden if i == len(blocks) else None)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward
