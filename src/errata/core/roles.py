"""Which linears of a block write to the residual stream, found by trying, every block by itself.

A *writer* is a module with a matrix whose output is added to the block's while every other matrix of the block is held: each gives what
it gave before, whatever it reads.  So a query or an MLP's first linear is none, for the matrices behind it are held; a norm, a scale or a
gate between a writer and the stream does no harm.  What is added moves all tokens alike; a gate that stands behind the last matrix
(RWKV's receptance) moves each by what it scales, and is no writer.  A second trial tells writers that *mix* tokens (attention, a
convolution, a running state) from those that work on each token alone (an MLP, its experts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.core import offload
from errata.core.families import Family, hidden_of, is_linear, resolve
from errata.core.forward import hooks_disabled
from errata.errors import ModelError

_TOKENS = (1, 2, 3, 4)  # of the trial; the last but one is changed to see whether the last one notices
_NAMES = {"mlp_down": r"mlp|ffn|feed_forward|fc", "attn_out": r"attn|attention"}  # between writers that trials cannot tell apart
_WHO = {"mlp_down": "its MLP", "attn_out": "its attention"}
_LARGE = 30.0  # times the states: a norm behind a writer then gives the direction of what is added
_MOST = 5e3  # and no more than float16 can hold
_ALIKE = 0.5  # the least cosine of what two tokens are moved by; of a scale that differs by number and token it stays well above
_NOTICED = 1e-3  # of a writer's output, the least change that is no rounding


@dataclass(frozen=True)
class Writers:
    """Of one block: paths of what writes each token by itself, of what mixes tokens, and which of them are linears.

    Experts of one list count once, with ``*`` for their number.
    """

    alone: tuple[str, ...] = ()
    mixing: tuple[str, ...] = ()
    linears: frozenset[str] = frozenset()

    def of(self, point: str) -> tuple[str, ...]:
        """The writers that ``point`` (``mlp_down`` or ``attn_out``) may mean: one, several where it is ambiguous, none."""
        found, other = (self.alone, self.mixing) if point == "mlp_down" else (self.mixing, self.alone)
        if not found and len(other) > 1:  # an MLP that looks at the token before (RWKV), attention to another block's keys (Gemma 3n)
            found = _named(other, point)
        by_name = _named(found, point)
        return by_name if len(by_name) == 1 and self.linears.issuperset(found) else found


def _named(paths: Sequence[str], point: str) -> tuple[str, ...]:
    return tuple(path for path in paths if re.search(_NAMES[point], path))


@dataclass(frozen=True)
class Roles:
    """What the trials found: the writers of every block, and the norm that runs last, where there is one."""

    name: str
    blocks: tuple[Writers, ...]
    final_norm: str

    def path(self, block: int, point: str) -> str:
        """Path of the one linear that ``point`` means in the block; `ModelError` with what is there instead."""
        found, own = self.blocks[block].of(point), self.blocks[block]
        if len(found) == 1 and found[0] in own.linears:
            return found[0]
        others = [b for b in range(len(self.blocks)) if b != block and self._has(b, point)]
        advice = f"there is one in block {ranges(others)}" if others else "no block has one"
        raise ModelError(f"{self.name}: block {block} has no {point}: {self.missing(block, point)}; {advice}")

    def missing(self, block: int, point: str) -> str:
        """Why the block has no such linear: what there is."""
        own = self.blocks[block]
        found = own.of(point)
        kinds = [path if path in own.linears else f"{path} (experts, not one linear)" for path in found]
        if len(found) > 1:
            return f"{_WHO[point]} writes through {' and '.join(kinds)}, and which is meant is not clear; name one by its path"
        if found:
            return f"{_WHO[point]} writes through {kinds[0]}"
        what = "works on each token by itself" if point == "mlp_down" else "mixes tokens"
        there = ", ".join([*own.alone, *own.mixing]) or "nothing that was found"
        return f"nothing that {what} writes to the residual stream in it (what does: {there})"

    def experts(self, block: int) -> str:
        """Path of the experts that the block's MLP writes through, beside what else it does; `ModelError` where there are none."""
        own = self.blocks[block]
        found = [path for path in own.alone if path not in own.linears and "*" not in path]
        if len(found) == 1:
            return found[0]
        raise ModelError(f"{self.name}: block {block} has no fused experts: {self.missing(block, 'mlp_down')}")

    def _has(self, block: int, point: str) -> bool:
        found = self.blocks[block].of(point)
        return len(found) == 1 and found[0] in self.blocks[block].linears


def ranges(numbers: Sequence[int]) -> str:
    """0, 2-4 of 0, 2, 3, 4."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][-1] + 1:
            out[-1].append(n)
        else:
            out.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in out)


@torch.no_grad()
def find_roles(hf: nn.Module, family: Family) -> Roles:
    """Try every block of the unedited base, in one pass over a few tokens."""
    blocks = resolve(hf, family.blocks)
    found: list[Writers] = [Writers()] * len(blocks)
    norms: list[str] = []

    def tries(number: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            norms.clear()  # only what runs after the last block is the last
            with hooks_disabled(block):
                found[number] = _Trial(block, args, kwargs, hidden_of(output).shape[-1]).writers()

        return hook

    with hooks_disabled(hf), ExitStack() as exits:
        for number, block in enumerate(blocks):
            exits.callback(block.register_forward_hook(tries(number), with_kwargs=True).remove)
        for path, module in hf.named_modules():
            if "norm" in type(module).__name__.lower() and not path.startswith(f"{family.blocks}."):
                exits.callback(module.register_forward_hook(lambda *_, path=path: norms.append(path)).remove)
        hf(input_ids=torch.tensor([_TOKENS], device=offload.device(hf)), use_cache=False)
    return Roles(family.name, tuple(found), norms[-1] if norms else "")


class _Trial:
    """One block, run again and again on what it was given."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], width: int) -> None:
        self.block, self.args, self.kwargs, self.width = block, args, kwargs, width
        self.matrices = {path: m for path, m in block.named_modules() if path and (is_linear(m) or _owns_matrix(m))}
        self.kept: dict[str, list[Any]] = {path: [] for path in self.matrices}
        with ExitStack() as exits:
            for path, module in self.matrices.items():
                exits.callback(module.register_forward_hook(lambda *a, path=path: self.kept[path].append(_copied(a[-1]))).remove)
            self.before = self._run()
        self.size = float(self.before.abs().max())

    def writers(self) -> Writers:
        candidates = [path for path, outputs in self.kept.items() if outputs and self._wide(outputs[0])]
        found = [path for path in candidates if self._writes(path)]
        found = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
        mixing = {path: self._mixes(path, [other for other in found if _group(other) != _group(path)]) for path in found}
        groups = {m: tuple(dict.fromkeys(_group(path) for path in found if mixing[path] is m)) for m in (False, True)}
        return Writers(groups[False], groups[True], frozenset(path for path in found if is_linear(self.matrices[path])))

    def _wide(self, output: Any) -> bool:
        return isinstance(output, Tensor) and output.shape[-1] == self.width

    def _writes(self, path: str) -> bool:
        """Whether a push of this output, up and down, moves the tokens of the block's output, and all alike."""
        others = [other for other in self.matrices if other != path and not path.startswith(f"{other}.")]
        own = max(float(output.abs().max()) for output in self.kept[path])
        push = min(_LARGE * own + self.size, _MOST) * torch.randn(self.width, generator=torch.Generator().manual_seed(0))
        ends = []
        for sign in (1, -1):
            with self._held(others), self._pushed(path, sign * push):
                ends.append(self._run().double())
        moved = (ends[0] - ends[1]).flatten(0, -3)  # [planes, T, D]
        counts = [own[own.norm(dim=-1) > _NOTICED * self.size] for own in moved]  # an expert serves some tokens only
        units = [functional.normalize(own, dim=-1) for own in counts if len(own)]
        return bool(units) and all(bool((own @ own.mT > _ALIKE).all()) for own in units)

    def _mixes(self, path: str, held: Sequence[str]) -> bool:
        """Whether the writer's output at the last token depends on the token before, with the other writers held."""
        seen: list[Tensor] = []
        handle = self.matrices[path].register_forward_hook(lambda _, __, output: seen.append(output.clone()))
        try:
            with self._held(held):
                self._run(changed=True)
        finally:
            handle.remove()
        before = self.kept[path][0]
        if not seen or seen[0].shape != before.shape or before.numel() != len(_TOKENS) * self.width:
            return False  # an expert of a list
        rows = [t.reshape(-1, self.width)[-1].double() for t in (before, seen[0])]
        return bool((rows[1] - rows[0]).abs().max() > _NOTICED * rows[0].abs().max())

    def _run(self, changed: bool = False) -> Tensor:
        """The block's output, a copy; ``changed``: with the last token but one of its input moved."""
        args, kwargs = [_copied(a) for a in self.args], {name: _copied(a) for name, a in self.kwargs.items()}
        if changed:
            hidden = args[0] if args else kwargs["hidden_states"]
            noise = torch.randn(hidden[..., -2, :].shape, generator=torch.Generator().manual_seed(1))
            hidden[..., -2, :] += float(hidden.abs().max()) * noise.to(hidden)
        out: Tensor = _copied(hidden_of(self.block.forward(*args, **kwargs)))
        return out

    @contextmanager
    def _held(self, paths: Sequence[str]) -> Iterator[None]:
        """These modules give what they gave, call by call; what comes in another shape now (experts of a list) is let through."""

        def hold(path: str) -> Callable[..., Any]:
            left = iter(self.kept[path])

            def hook(_: Any, __: Any, output: Any) -> Any:
                kept = next(left, output)
                alike = not isinstance(output, Tensor) or output.shape == kept.shape
                return _copied(kept) if alike else output

            return hook

        with ExitStack() as exits:
            for path in paths:
                exits.callback(self.matrices[path].register_forward_hook(hold(path)).remove)
            yield

    @contextmanager
    def _pushed(self, path: str, push: Tensor) -> Iterator[None]:
        handle = self.matrices[path].register_forward_hook(lambda _, __, output: output + push.to(output))
        try:
            yield
        finally:
            handle.remove()


def _owns_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _group(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _copied(value: Any) -> Any:
    """Tensors copied, in tuples too: a block may write into what it is given."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if type(value) is tuple else value
