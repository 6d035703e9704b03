"""Rows and banks: which patch stack runs on which row of a batch, as hooks on the frozen model.

A *bank* holds the ops of one kind at one site for several stacks, parameters stacked along a leading axis ``P``; every
row of a batch names its entry.  One mechanism serves training many edits at once, scoring many edited models at once,
and serving many users' stacks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from errata import registry
from errata.families import Family, resolve
from errata.patch import Op, Patch, Site

Stack = tuple[Patch, ...]


@dataclass
class Context:
    """What an op may know of the call it runs in.

    position        [B, T] unpadded position of each token of this chunk; -1 where it is padding
    prompt_lengths  [B] prompt tokens of each row, unpadded
    tape            filled with what ops `note` (gate weights, for example) when not None
    """

    position: Tensor
    prompt_lengths: Tensor
    tape: dict[tuple[Site, str], Tensor] | None = None

    def active(self, last: int) -> Tensor:
        """[B, T, 1] bool: the last ``last`` tokens of the prompt and every later token."""
        return ((self.position >= 0) & (self.position >= self.prompt_lengths[:, None] - last)).unsqueeze(-1)

    def note(self, site: Site, name: str, value: Tensor) -> None:
        if self.tape is not None:
            self.tape[site, name] = value

    def select(self, rows: Tensor) -> Context:
        return Context(self.position[rows], self.prompt_lengths[rows], None)


@dataclass
class Bank:
    """Parameters [P, …] of ops that compute alike at one site; ``rows`` [B] names each row's entry.

    ``rows`` None: the single entry serves every row, or (P == B) entry i serves row i.  -1: the row runs without.
    """

    kind: str
    site: Site
    settings: Mapping[str, Any]
    params: Mapping[str, Tensor]
    rows: Tensor | None = None

    def apply(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The site's new output; rows without an entry pass through untouched, bit for bit."""
        kind = registry.get("op", self.kind)
        if self.rows is None:
            out: Tensor = kind.apply(self.params, self.settings, x, y, self.site, context)
            return out
        chosen = (self.rows >= 0).nonzero().squeeze(1)
        if len(chosen) == len(self.rows):
            gathered = {k: t[self.rows] for k, t in self.params.items()}
            out = kind.apply(gathered, self.settings, x, y, self.site, context)
            return out
        if not len(chosen):
            return y
        gathered = {k: t[self.rows[chosen]] for k, t in self.params.items()}
        part = kind.apply(gathered, self.settings, x[chosen], y[chosen], self.site, context.select(chosen))
        return y.index_copy(0, chosen, part)


@dataclass
class Plan:
    """Banks per site, in the order they run; and, while a call is on, its context."""

    banks: dict[Site, list[Bank]] = field(default_factory=dict)
    prompt_lengths: Tensor | None = None  # None: a raw call; the prompt ends where the first chunk's mask ends
    tape: dict[tuple[Site, str], Tensor] | None = None
    context: Context | None = None
    enabled: bool = True

    def add(self, bank: Bank) -> None:
        self.banks.setdefault(bank.site, []).append(bank)


def live(stack: Stack) -> Stack:
    """The patches of a stack that run: one that a later patch replaces stands aside."""
    gone = {old for patch in stack for old in patch.replaces}
    return tuple(p for p in stack if p.id not in gone)


def compile_plan(stacks: Sequence[Stack], rows: Tensor | None, device: torch.device) -> Plan:
    """Stacks as banks: the j-th op of each stack at a site joins the j-th group; alike ones share a bank.

    ``rows`` [B] names the stack of each row; None means that the one stack given serves every row.
    """
    plan = Plan()
    per_site: dict[Site, list[list[Op]]] = {}
    for i, stack in enumerate(stacks):
        for op in (op for patch in live(stack) for op in patch.ops):
            per_site.setdefault(op.site, [[] for _ in stacks])[i].append(op)
    for columns in per_site.values():
        for depth in range(max(map(len, columns))):
            groups: dict[Any, list[int]] = {}
            for i, ops in enumerate(columns):
                if depth < len(ops):
                    groups.setdefault(ops[depth].signature(), []).append(i)
            for members in groups.values():
                plan.add(_bank([columns[i][depth] for i in members], members, len(stacks), rows, device))
    return plan


def _bank(ops: list[Op], members: list[int], count: int, rows: Tensor | None, device: torch.device) -> Bank:
    distinct: dict[int, int] = {}  # one tensor set shared by several stacks is stacked once
    entries: list[int] = []
    kept: list[Op] = []
    for op in ops:
        if id(op) not in distinct:
            distinct[id(op)] = len(kept)
            kept.append(op)
        entries.append(distinct[id(op)])
    params = {name: torch.stack([op.tensors[name].to(device) for op in kept]) for name in ops[0].tensors}
    chosen = None
    if rows is not None:
        lookup = torch.full((count,), -1, dtype=torch.long)
        lookup[torch.tensor(members)] = torch.tensor(entries)
        chosen = lookup.to(device)[rows.to(device)]
        if len(kept) == 1 and bool((chosen == 0).all()):
            chosen = None
    return Bank(ops[0].kind, ops[0].site, ops[0].settings, params, chosen)


class Hooks(AbstractContextManager["Hooks"]):
    """The plan's banks as forward hooks, for as long as the context (or until `close`)."""

    def __init__(self, hf: Any, family: Family, plan: Plan) -> None:
        self.plan, self._exit = plan, ExitStack()
        if not plan.banks:
            return
        blocks = resolve(hf, family.blocks)
        self._hold(hf.register_forward_pre_hook(self._before, with_kwargs=True))
        for site in sorted(plan.banks):
            module = blocks[site.block] if site.point == "block" else resolve(blocks[site.block], family.linear_path(site.point))
            self._hold(module.register_forward_hook(self._after(site)))

    def _hold(self, handle: Any) -> None:
        self._exit.callback(handle.remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.plan.enabled:
            self.plan.context = _context(self.plan, args, kwargs)

    def _after(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            context = self.plan.context
            if context is None or not self.plan.enabled:
                return None
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else y
            for bank in self.plan.banks[site]:
                y = bank.apply(x, y, context)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def close(self) -> None:
        self._exit.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _context(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Context:
    """Positions of this chunk in unpadded coordinates, from the attention mask and the cache's length."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    rows, width = tokens.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        mask = torch.ones((rows, past + width), dtype=torch.long, device=tokens.device)
    mask = mask[:, : past + width]
    position = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, -1)
    lengths = plan.prompt_lengths
    if lengths is None:  # a raw call: everything after the first chunk was generated
        lengths = mask.long().sum(1) if past == 0 else torch.zeros(rows, dtype=torch.long, device=tokens.device)
    return Context(position[:, -width:].to(tokens.device), lengths.to(tokens.device), plan.tape)
