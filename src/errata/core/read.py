"""Reading the model: what goes into and comes out of chosen sites at one token of each row, in as few passes as possible.

Causal attention means that a token's states depend on nothing after it, so a row ends at the token that is read, but for a stack that
`non_causal`: what that does depends on the whole prompt.  Blocks above the highest site need not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from errata.core.bank import Bank, Stack, active_patches, non_causal
from errata.core.experts import inputs
from errata.core.families import by_row, hidden_of
from errata.core.forward import StopForward
from errata.core.model import LM
from errata.core.patch import WEIGHT_LIKE, Site
from errata.core.tokens import Encoded

AT_ONCE = 16_384  # tokens of one pass, padding included


def truncate(row: Encoded, at: int) -> Encoded:
    """The row as far as token ``at``; what counts as prompt stays as it was."""
    return replace(row, ids=row.ids[: at + 1])


@contextmanager
def activation_hooks(
    lm: LM, sites: Sequence[Site], rows: int, seen: Callable[[Site, Tensor, Tensor], None], stop: bool = True
) -> Iterator[None]:
    """``seen(site, input [B, T, I], output [B, T, O])`` of a batch of ``rows`` as each site runs.  Of experts the input is
    `errata.core.experts.ExpertInputs`.

    With ``stop``, the pass ends (`StopForward`) once all have.

    Made inside `LM.running`, it sees outputs as the running patches leave them.
    """
    left = set(sites)

    def watch(site: Site) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = inputs(module, args or (kwargs["hidden_states"],), rows, None, site)
            seen(site, x, by_row(hidden_of(output), rows, None, site))
            left.discard(site)
            if stop and not left:
                raise StopForward

        return hook

    handles = [lm.module(site).register_forward_hook(watch(site), with_kwargs=True) for site in dict.fromkeys(sites)]
    try:
        yield
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read_activations(
    lm: LM,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    *,
    at: Sequence[int] | None = None,
    on: Stack = (),
    banks: Sequence[Bank] = (),
    owner: Tensor | None = None,
) -> dict[Site, tuple[Tensor, Tensor]]:
    """{site: (input [B, I], output [B, O])} at one token of each row, under ``on`` and then ``banks``.

    ``at``: which token, None for the last.  ``owner`` [B] names each row's entry of the banks.  float32, or wider where the model is.
    Rows of one text and owner run once.
    """
    at = [len(row.ids) - 1 for row in rows] if at is None else at
    ahead = non_causal(on)
    precision = torch.promote_types(torch.float32, lm.dtype)
    texts, which = _texts(rows, at, owner.tolist() if owner is not None else [0] * len(rows), ahead)
    found: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in sites}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0].ids))
    done: list[int] = []  # the rows in the order in which they are read

    def keep(site: Site, x: Tensor, y: Tensor) -> None:
        found[site].append((x[here, place].to(precision), y[here, place].to(precision)))

    for chunk in _chunks([len(texts[i][0].ids) for i in order]):
        members = order[chunk]
        batch = lm.batch([texts[i][0] for i in members]).to(lm.device)
        plan = lm.plan([on], None, len(members))
        plan.prompt_lengths = batch.prompt_lengths
        wanted = [(n, row) for n, i in enumerate(members) for row in which[i]]
        here = torch.tensor([n for n, _ in wanted], device=lm.device)
        place = torch.tensor(
            [at[row] - len(texts[members[n]][0].ids) for n, row in wanted], device=lm.device
        )  # from the end: rows end together
        done += [row for _, row in wanted]
        for bank in banks:
            plan.add(replace(bank, rows=None if owner is None else torch.tensor([texts[i][1] for i in members], device=owner.device)))
        with lm.running(plan), activation_hooks(lm, sites, len(members), keep):
            lm.forward(batch.ids, batch.mask, use_cache=False, **lm.last_logits_kwargs)
    back = torch.tensor(sorted(range(len(done)), key=done.__getitem__), device=lm.device)
    return {site: tuple(torch.cat(part)[back] for part in zip(*parts, strict=True)) for site, parts in found.items()}  # type: ignore[misc]


def _texts(
    rows: Sequence[Encoded], at: Sequence[int], owner: Sequence[int], ahead: bool
) -> tuple[list[tuple[Encoded, int]], list[list[int]]]:
    """([(text as far as it has to run, owner)], the rows that are read in each): a text read at several places runs once."""
    first: dict[tuple[Encoded, int], int] = {}
    which: list[list[int]] = []
    for i, (row, own) in enumerate(zip(rows, owner, strict=True)):
        if (row, own) not in first:
            first[row, own] = len(which)
            which.append([])
        which[first[row, own]].append(i)
    ends = [max(at[i] for i in members) for members in which]
    cut = [(truncate(row, max(end, row.prompt_length - 1) if ahead else end), own) for (row, own), end in zip(first, ends, strict=True)]
    return cut, which


def _chunks(lengths: Sequence[int]) -> Iterator[slice]:
    """Slices of rows sorted by length whose padded tokens stay under `AT_ONCE`."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop - start + 1) * lengths[stop] > AT_ONCE:
            yield slice(start, stop)
            start = stop


def adds_directly(lm: LM, site: Site) -> bool:
    """Whether what the MLP's last linear, or its experts, write is added to the residual stream as it is.

    It is not where a norm follows, or where blocks hand on several states a token.

    Found by trying: a number added to the linear's output must come out of the block unchanged.
    """
    if ("adds", site) not in lm.base_cache:
        lm.base_cache["adds", site] = _adds(lm, site)
    return bool(lm.base_cache["adds", site])


def adds_to_block(lm: LM, site: Site, on: Stack) -> bool:
    """Whether adding to the output of ``site`` is adding the same to its block's output under ``on``, so that the block need not run."""
    if site.point != "mlp_down":
        return False
    bent = any(op.site == Site(site.block) and op.kind not in WEIGHT_LIKE for patch in active_patches(on) for op in patch.ops)
    return not bent and adds_directly(lm, site)


def _adds(lm: LM, site: Site) -> bool:
    linear, out = lm.module(site), lm.blocks[site.block]
    row = lm.batch([Encoded((0,), 1)]).to(lm.device)

    def output(push: float) -> Tensor:
        seen: list[Tensor] = []
        handles = [
            linear.register_forward_hook(lambda _, x, y: y + push),
            out.register_forward_hook(lambda _, x, y: seen.append(hidden_of(y).double())),
        ]
        try:
            with torch.no_grad():
                lm.forward(row.ids, row.mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    before = output(0.0)
    push = 3 + 3 * float(before.abs().max())  # larger than the states, so that rounding does not hide it, nor a norm, which gives about 1
    return before.ndim == 3 and bool((output(push) - before - push).abs().max() < 0.05 * push)
