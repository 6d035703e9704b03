"""Rows and banks: which patch stack runs on which row of a batch (`errata.core.hooks` runs them on the frozen model).

A *bank* holds the ops of one kind at one site for several stacks, parameters stacked along a leading axis ``P``; every
row of a batch names its entry.  One mechanism serves training many edits at once, scoring many edited models at once,
and serving many users' stacks at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from errata import registry
from errata.core.context import ContextInserter
from errata.core.patch import PROMPT, Op, Patch, Site
from errata.core.weights import RowGroups, fuse_additive, padded, sizes
from errata.errors import PatchError

Stack = tuple[Patch, ...]


class Replaces(Protocol):
    """What `active_patches` asks of a patch, or of what stands for one."""

    @property
    def id(self) -> str: ...
    @property
    def replaces(self) -> tuple[str, ...]: ...


R = TypeVar("R", bound=Replaces)
_Placed = tuple[Op, int]  # an op and the place of its patch in the stack
# See `Bank._by_entry`: numbers that may always be copied, and numbers whose copying takes as long as one more entry.
FEW, LAUNCH = 2_000_000, {"cpu": 20_000}


@dataclass
class ForwardContext:
    """What an op may know of the call it runs in.

    position        [B, T] unpadded position of each token of this chunk, as the caller counts; -1 where it is padding, or context that
                    a patch has put in front
    prompt_lengths  [B] prompt tokens of each row, unpadded
    recorded        filled with what ops `record` (gate weights, for example) when not None
    is_prefill      whether this chunk begins the text: it holds the prompt, later chunks what follows
    decisions       what an op decides on the first chunk and keeps for the later ones, a number a row of the whole batch
    rows, size      which rows of the batch these are (None: all), and how many it has
    patch_index     the place in its stack of the patch whose op is asked
    """

    position: Tensor
    prompt_lengths: Tensor
    recorded: dict[tuple[Site, str], Tensor] | None = None
    is_prefill: bool = True
    decisions: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    size: int = 0
    patch_index: int = 0

    def active(self, last: int | None) -> Tensor:
        """[B, T, 1] bool: the last ``last`` tokens of the prompt (None: all of them) and every later token."""
        there = self.position >= 0
        return (there if last is None else there & (self.position >= self.prompt_lengths[:, None] - last)).unsqueeze(-1)

    def record(self, site: Site, name: str, value: Tensor) -> None:
        if self.recorded is not None:
            self.recorded[site, name] = value

    def save_decision(self, name: str, value: Tensor) -> None:
        """Keep ``value`` [b], a number for each of these rows, for ops of the same patch at later sites and in later chunks of the text."""
        if self.rows is not None:
            kept = self.decisions.get((self.patch_index, name))
            value = (value.new_zeros(self.size) if kept is None else kept).index_copy(0, self.rows, value)
        self.decisions[self.patch_index, name] = value

    def load_decision(self, name: str) -> Tensor:
        """What `save_decision` kept of these rows, [b]."""
        if (self.patch_index, name) not in self.decisions:
            raise PatchError(
                f"no {name} was decided for this text: it began before the patch was on; start it anew with the patch attached"
            )
        value = self.decisions[self.patch_index, name]
        return value if self.rows is None else value[self.rows]

    def select(self, rows: Tensor) -> ForwardContext:
        """The context of some rows; it shares the decisions."""
        own = rows if self.rows is None else self.rows[rows]
        return replace(self, position=self.position[rows], prompt_lengths=self.prompt_lengths[rows], recorded=None, rows=own)


@dataclass
class Bank:
    """Parameters [P, …] of ops that compute alike at one site; ``rows`` [B] names each row's entry.

    ``rows`` None: the single entry serves every row, or (P == B) entry i serves row i.  -1: the row runs without.
    ``patch_index``: the place in their stacks of the patches these ops belong to; ops of one patch find each other's decisions by it.
    """

    kind: str
    site: Site
    settings: Mapping[str, Any]
    params: Mapping[str, Tensor]
    rows: Tensor | None = None
    patch_index: int = 0

    @cached_property
    def groups(self) -> RowGroups:
        """The rows of each entry; found once, because it waits for the device."""
        assert self.rows is not None
        return RowGroups.of(self.rows)

    def apply(self, x: Tensor, y: Tensor, context: ForwardContext) -> Tensor:
        """The site's new output; rows without an entry pass through untouched, bit for bit."""
        kind = registry.get("op", self.kind)
        out: Tensor
        if self.patch_index != context.patch_index:
            context = replace(context, patch_index=self.patch_index)
        if self.rows is None:
            out = kind.apply(self.params, self.settings, x, y, self.site, context)
        elif hasattr(kind, "apply_grouped") and self._by_entry(y.device):
            out = kind.apply_grouped(self.params, self.groups, self.settings, x, y, self.site, context)
        elif len(chosen := (self.rows >= 0).nonzero().squeeze(1)) == len(self.rows):
            out = kind.apply({k: t[self.rows] for k, t in self.params.items()}, self.settings, x, y, self.site, context)
        elif not len(chosen):
            out = y
        else:
            gathered = {k: t[self.rows[chosen]] for k, t in self.params.items()}
            part = kind.apply(gathered, self.settings, x[chosen], y[chosen], self.site, context.select(chosen))
            out = y.index_copy(0, chosen, part)
        return out

    def select(self, rows: Tensor) -> Bank:
        """The bank of some rows of the batch, one also several times."""
        one, chosen = len(next(iter(self.params.values()))) == 1, rows if self.rows is None else self.rows[rows]
        every = one and (self.rows is None or bool((chosen == 0).all()))
        return replace(self, rows=None if every else chosen)

    def _by_entry(self, device: torch.device) -> bool:
        """Whether to take a product an entry (`Kind.apply_grouped`) instead of a copy of the parameters a row.

        Milliseconds, copies/by entry, on one CPU core, 192 rows of 12 tokens, I = 640, O = 256, float32, at 1, 20 and 190 entries:
        dense 105/12, 108/13, 112/22; rank 1 0.4/0.7, 0.3/0.8, 0.3/1.9; rank 8 1.1/1.2, 1.1/1.5, 1.3/3.2; rank 32 4.8/1.8, 5.2/2.5,
        5.2/5.6; rank 128 59/6, 60/7, 64/18.  One product over rows sorted and padded to equal groups lost to by entry (dense 8, 15, 24
        against 7, 8, 17).  The rule picks the faster in all of these.  On other devices ``LAUNCH`` is an estimate: launching an
        entry's kernels takes as long as copying some 10M numbers.
        """
        copied = len(self.groups.order) * sum(t[0].numel() for t in self.params.values())
        return bool(self.groups.entries) and copied > FEW + LAUNCH.get(device.type, 10_000_000) * len(self.groups.entries)


@dataclass
class Plan:
    """Banks per site, in the order they run; what stands in front of prompts; and, while a call is on, its context."""

    banks: dict[Site, list[Bank]] = field(default_factory=dict)
    prompt_lengths: Tensor | None = None  # None: a raw call, which says itself where the prompt ends (`errata.core.hooks`)
    recorded: dict[tuple[Site, str], Tensor] | None = None
    context: ForwardContext | None = None
    decisions: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # of the text that runs (see `ForwardContext.decisions`)
    enabled: bool = True
    inserter: ContextInserter | None = None
    reads_prompt_end: bool = False  # whether an op acts or decides by where the prompt ends

    def add(self, bank: Bank) -> None:
        self.banks.setdefault(bank.site, []).append(bank)

    def select(self, rows: Tensor) -> Plan:
        """The plan of some rows with what was decided on their prompts; the two go on without each other."""
        out = Plan(
            decisions={name: value[rows] for name, value in self.decisions.items()},
            inserter=self.inserter and self.inserter.select(rows),
            reads_prompt_end=self.reads_prompt_end,
        )
        out.prompt_lengths = None if self.prompt_lengths is None else self.prompt_lengths[rows]
        for bank in (bank.select(rows) for banks in self.banks.values() for bank in banks):
            if bank.rows is None or bool((bank.rows >= 0).any()):
                out.add(bank)
        return out


def active_patches(stack: tuple[R, ...]) -> tuple[R, ...]:
    """The patches of a stack that run: one that a later patch replaces stands aside.  (Or entries of a ledger, which name patches.)"""
    gone = {old for patch in stack for old in patch.replaces}
    return tuple(p for p in stack if p.id not in gone)


def non_causal(stack: Stack) -> bool:
    """Whether what an op does to a token may depend on later tokens of the prompt (a memory that reads the prompt and then
    acts on all of it).  Such a kind says so in ``non_causal(settings)``; nothing of the prompt can then be computed apart."""
    ops = (op for patch in active_patches(stack) for op in patch.ops)
    return any(getattr(registry.get("op", op.kind), "non_causal", lambda settings: False)(op.settings) for op in ops)


def _reads_prompt_end(stack: Stack) -> bool:
    """Whether an op of it acts or decides by where the prompt ends: its kind says so in ``reads_prompt_end(settings)``."""
    ops = (op for patch in active_patches(stack) for op in patch.ops)
    return any(getattr(registry.get("op", op.kind), "reads_prompt_end", lambda settings: False)(op.settings) for op in ops)


def compile_plan(stacks: Sequence[Stack], rows: Tensor | None, device: torch.device, tokenizer: Any = None) -> Plan:
    """Stacks as banks: the j-th op of each stack at a site joins the j-th group; alike ones share a bank.

    Ops that only add, following each other at a site, are one there (`errata.core.weights.fuse_additive`): a thousand cost one product a
    site.  ``rows`` [B] names the stack of each row; None means that the one stack given serves every row.  ``tokenizer``: for ops that read
    the prompt as text.
    """
    plan = Plan(reads_prompt_end=any(map(_reads_prompt_end, stacks)))
    inserted: list[list[Op]] = [[op for patch in active_patches(stack) for op in patch.ops if op.site == PROMPT] for stack in stacks]
    if any(inserted):
        plan.inserter = ContextInserter(inserted, rows, tokenizer)
    per_site: dict[Site, list[list[_Placed]]] = {}
    for i, stack in enumerate(stacks):
        for patch_index, patch in enumerate(active_patches(stack)):
            for op in (op for op in patch.ops if op.site != PROMPT):
                per_site.setdefault(op.site, [[] for _ in stacks])[i].append((op, patch_index))
    made: dict[tuple[int, ...], Op] = {}
    for columns in per_site.values():
        columns = [fuse_additive(ops, device, made) for ops in columns]
        if (chain := _chain(columns, rows, device)) is not None:
            plan.add(chain)
            continue
        for depth in range(max(map(len, columns))):
            groups: dict[Any, list[int]] = {}
            for i, ops in enumerate(columns):
                if depth < len(ops):
                    groups.setdefault(_alike(*ops[depth]), []).append(i)
            for members in groups.values():
                bank = _bank([columns[i][depth][0] for i in members], members, len(stacks), rows, device)
                bank.patch_index = columns[members[0]][depth][1]
                plan.add(bank)
    return plan


def _chain(columns: Sequence[Sequence[_Placed]], rows: Tensor | None, device: torch.device) -> Any:
    """Ops that follow each other at a site as one, where their kind can (`errata.core.patch.Kind`); None where it cannot, or none do."""
    placed = [op for ops in columns for op, _ in ops]
    kind = registry.get("op", placed[0].kind)
    if max(map(len, columns)) < 2 or not hasattr(kind, "chain") or any(op.kind != placed[0].kind for op in placed):
        return None
    keys, own = {kind.chain_key(op) for op in placed}, [[op for op, _ in ops] for ops in columns]
    twice = any(len(set(map(id, ops))) < len(ops) for ops in own)
    return None if twice or len(keys) > 1 or None in keys else kind.chain(own, rows, device)


def _alike(op: Op, patch_index: int) -> tuple[Any, ...]:
    """Ops with equal keys share a bank: those of equal signatures, or what a kind says with ``bank_key(op)``.  Low ranks are padded to
    the largest there (exact), up to 4 or up to twice their own.  Of stateful kinds, only those at one place of
    their stacks do."""
    kind = registry.get("op", op.kind)
    key: tuple[Any, ...] = (op.kind, *kind.bank_key(op)) if hasattr(kind, "bank_key") else op.signature()
    if getattr(kind, "stateful", False):
        return patch_index, *key
    if op.kind != "low_rank":
        return key
    rank, inner, outer = sizes(op)
    return op.kind, inner, outer, max(2, (rank - 1).bit_length()), *(str(op.tensors[k].dtype) for k in ("down", "up"))


def _bank(ops: list[Op], members: list[int], count: int, rows: Tensor | None, device: torch.device) -> Bank:
    distinct: dict[int, int] = {}  # one tensor set shared by several stacks is stacked once
    entries: list[int] = []
    kept: list[Op] = []
    for op in ops:
        if id(op) not in distinct:
            distinct[id(op)] = len(kept)
            kept.append(op)
        entries.append(distinct[id(op)])
    if ops[0].kind == "low_rank":
        rank = max(sizes(op)[0] for op in kept)
        kept = [padded(op, rank) for op in kept]
    kind = registry.get("op", ops[0].kind)
    if hasattr(kind, "stack_params"):
        params = kind.stack_params(kept, device)
    elif len(kept) == 1:  # used as it is, not copied
        params = {name: t.to(device)[None] for name, t in kept[0].tensors.items()}
    else:
        params = {name: torch.stack([op.tensors[name].to(device) for op in kept]) for name in ops[0].tensors}
    chosen = None
    if rows is not None:
        lookup = torch.full((count,), -1, dtype=torch.long)
        lookup[torch.tensor(members)] = torch.tensor(entries)
        chosen = lookup.to(device)[rows.to(device)]
        if len(kept) == 1 and bool((chosen == 0).all()):
            chosen = None
    return Bank(ops[0].kind, ops[0].site, ops[0].settings, params, chosen)
