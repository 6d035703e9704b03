"""Mutations of JSON values, texts, bytes and tensors, drawn from a seed; and what is counted of what became of them."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

SLOW, STUCK = 2.0, 30  # seconds of computing that are too many; seconds after which an attempt is broken off
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 5, -5, 1.5, -0.0, 10**9, 2**31, 2**63, -(10**30), 10**400, 1e308, float("inf"), float("nan"), "", " ", "x",
    "evil", "None", "0", "../../etc/passwd", "os:system", "subprocess:Popen", "this:s", ":", "a\x00b", "\ud800", "é" * 50, "a" * 5000, "\n", [], {},
    [[]], [None], {"": None}, {"a": 1}, ["a"] * 40, [0] * 40, [1, 2], [-1], ["last"], "last", "all", "input", "single", "continual", "batched(0)",
    "batched(" + "9" * 5000 + ")", "!!bool maybe", "almanac", "baft", "rome", "block", "mlp_down", "mlp.down_proj", "attn_out", "subspace", "dense",
]  # fmt: skip
DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]


class Stuck(BaseException):
    """An attempt that does not end by itself; no handler of errata's catches it."""


@dataclass
class Figures:
    """tried = refused (an `ErrataError`) + accepted + failed.  failed: another exception; later: accepted, then raised; slow: over 2 s."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    failed: list[str] = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    slowest: float = 0.0
    why: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        return not (self.failed or self.later or self.slow)

    def attempt(self, name: str, read: Callable[[], Any], use: Callable[[Any], object]) -> None:
        """``read`` may refuse by an `ErrataError`; what it gives, ``use`` must bear.  Seconds are of this process: others may be busy."""
        from errata.errors import ErrataError

        self.tried += 1
        began = time.process_time()
        try:
            with _broken_off():
                found = read()
        except ErrataError as error:
            self.refused += 1
            self.why[type(error).__name__] += 1
        except (Exception, Stuck) as error:
            self.failed.append(_told(name, error))
        else:
            self.accepted += 1
            try:
                with _broken_off():
                    use(found)
            except (Exception, Stuck) as error:
                self.later.append(_told(name, error))
        spent = time.process_time() - began
        self.slowest = max(self.slowest, spent)
        if spent > SLOW:
            self.slow.append(f"{name}: {spent:.1f} s")

    def to_dict(self) -> dict[str, Any]:
        counts = {"tried": self.tried, "refused": self.refused, "accepted": self.accepted, "by": dict(self.why.most_common())}
        faults = {"failed": len(self.failed), "accepted and then raised": len(self.later), "slower than 2 s": len(self.slow)}
        return {**counts, **faults, "slowest": round(self.slowest, 3), "faults": [*self.failed, *self.later, *self.slow][:20]}


def _told(name: str, error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name}: {type(error).__name__}: {str(error)[:160]} ({where.filename.rpartition('/')[2]}:{where.lineno})"


@contextlib.contextmanager
def _broken_off() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Stuck(f"not done after {STUCK} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(STUCK)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def odd(rng: random.Random) -> Any:
    """One of `ODD`, to be changed as one likes."""
    return copy.deepcopy(rng.choice(ODD))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*at, key))


def mutated(value: Any, rng: random.Random, times: int = 1) -> Any:
    """A copy of a JSON value with something in it replaced, dropped, doubled, renamed, nested, or taken from elsewhere in it."""
    out = copy.deepcopy(value)
    for _ in range(times):
        every = list(places(out))
        if not every:
            return odd(rng)
        path = rng.choice(every)
        holder = out
        for step in path[:-1]:
            holder = holder[step]
        _change(holder, path[-1], out, every, rng)
    return out


def _change(holder: Any, key: Any, whole: Any, every: list[tuple[Any, ...]], rng: random.Random) -> None:
    how = rng.choice(["odd", "odd", "odd", "drop", "more", "rename", "nest", "elsewhere", "near"])
    if how == "drop":
        del holder[key]
    elif how == "more":
        if isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([holder[key], odd(rng)])))
        else:
            holder[rng.choice(["extra", "", "rank", "cls", "lm", "preset", f"{key}x"])] = odd(rng)
    elif how == "rename" and isinstance(holder, dict):
        holder[rng.choice([f"{key}x", str(key).upper(), ""])] = holder.pop(key)
    elif how == "nest":
        depth = rng.choice([1, 2, 50, 70, 300])
        holder[key] = json.loads("[" * depth + "]" * depth) if depth > 2 else [holder[key]]
    elif how == "elsewhere":
        other = whole
        for step in rng.choice(every):
            other = other[step]
        holder[key] = copy.deepcopy(other)
    elif how == "near" and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] += rng.choice([-1, 1, 0.5, 1000, -holder[key]])
    else:
        holder[key] = odd(rng)


def scratched(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, dropped, doubled or filled in."""
    at, some = rng.randrange(len(content) + 1), rng.randrange(1, 64)
    how = rng.choice(["flip", "cut", "drop", "double", "noise", "empty"])
    if how == "flip":
        return content[:at] + bytes(b ^ rng.randrange(1, 256) for b in content[at : at + 1]) + content[at + 1 :]
    if how == "noise":
        return content[:at] + rng.randbytes(some) + content[at:]
    return {"cut": content[:at], "drop": content[:at] + content[at + some :], "double": content[: at + some] + content[at:], "empty": b""}[
        how
    ]


def twisted(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another dtype, shape or other numbers."""
    flat = tensor.flatten()
    how = rng.choice(["dtype", "more", "less", "axis", "turn", "flat", "value", "value", "value", "scale", "empty", "shuffle"])
    if how == "dtype":
        return tensor.to(rng.choice(DTYPES))
    if how in ("more", "less") and tensor.ndim:
        axis = rng.randrange(tensor.ndim)
        part = tensor.narrow(axis, 0, min(1, tensor.shape[axis]))
        return torch.cat([tensor, part], axis) if how == "more" else tensor.narrow(axis, 0, max(0, tensor.shape[axis] - 1))
    if how in ("axis", "turn", "flat", "empty"):
        return {"axis": tensor[None], "turn": tensor.T if tensor.ndim == 2 else tensor, "flat": flat, "empty": flat[:0]}[how].contiguous()
    if how == "scale" and tensor.is_floating_point():
        return tensor * rng.choice([0.0, -1.0, 1e3, 1e6, 1e11, 1e20])
    if how == "shuffle":
        return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))].view(tensor.shape)
    out = flat.clone()
    if len(out):
        real = [0.0, -1.0, 1e9, 3e38, float("nan"), float("inf")]
        out[rng.randrange(len(out))] = rng.choice(real if out.is_floating_point() else [0, 1, 2, 7, 100])
    return out.view(tensor.shape)
