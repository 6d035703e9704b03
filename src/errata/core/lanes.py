"""`in_lanes`: independent problems in batches of like length, the batches side by side on the cores of a CPU.

A batch of a few hundred tokens is hundreds of small calls a step, most too small to be worth a second core each.  So every
core takes whole batches instead.  Hooks live on modules, hence each lane has a *replica* of the model: its own module objects around
the same weight tensors, a few milliseconds to make and no memory to speak of.

On a GPU, with one thread, or where a model is spread over devices there is one lane, and this is a plain loop.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from errata.core.model import LM

T = TypeVar("T")
Progress = Callable[[int, int, float], None]  # (step, problems that still run, loss)
Work = Callable[[LM, list[int], Progress], Sequence[T]]

MOST_ROWS = 128  # of a batch
FIXED_TOKENS = 32  # the cost of a batch's calls in tokens, measured with the almanac, a thread a lane
FIXED_TOKENS_ALONE = 100  # the same where one batch has both cores, or a GPU
_SHIFTS = (-16, -8, -4, -2, -1, 1, 2, 4, 8, 16)  # rows that a cut is tried to move by


def bucket_by_length(lengths: Sequence[int], most: int, fixed: int) -> list[list[int]]:
    """Indices in batches of like length, at most ``most`` in each, cut where that costs least.

    A batch costs its rows times its longest row, padding included, and ``fixed`` for its calls; the cheapest cuts of the rows
    sorted by length are found by dynamic programming over the places where the length changes.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    steps = [i for i in range(1, len(order)) if lengths[order[i]] != lengths[order[i - 1]]]
    places = sorted({0, *steps, len(order), *range(0, len(order), most)})
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # rows placed -> (cost, where the last batch began)
    for stop in places[1:]:
        reach = [begin for begin in places if begin < stop and stop - begin <= most]
        best[stop] = min((best[begin][0] + (stop - begin) * lengths[order[stop - 1]] + fixed, begin) for begin in reach)
    batches, stop = [], len(order)
    while stop:
        begin = best[stop][1]
        batches.append(order[begin:stop])
        stop = begin
    return batches


def plan_batches(lengths: Sequence[int], lanes: int, most: int = MOST_ROWS) -> list[list[int]]:
    """The batches that ``lanes`` lanes finish first, dearest first; each lane takes the next one when it is free.

    Starts from even cuts of the rows sorted by length and shifts, adds and removes single cuts as long as the last lane ends earlier.
    """
    if lanes == 1 or len(lengths) < 2:
        return bucket_by_length(lengths, most, FIXED_TOKENS_ALONE)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    longest = [lengths[i] for i in order]

    def time(cuts: frozenset[int]) -> float:
        """When the last lane ends, in tokens; of equal ends, the one with less work altogether is the earlier."""
        edges = [0, *sorted(cuts), len(order)]
        costs = sorted(((b - a) * longest[b - 1] + FIXED_TOKENS for a, b in pairwise(edges)), reverse=True)
        if max(b - a for a, b in pairwise(edges)) > most:
            return float("inf")
        busy = [0] * lanes
        for cost in costs:
            busy[busy.index(min(busy))] += cost
        return max(busy) + sum(costs) / (1 + sum(costs))

    def near(cuts: frozenset[int]) -> Iterator[frozenset[int]]:
        for cut in sorted(cuts):
            rest = cuts - {cut}
            yield rest
            yield from (rest | {cut + shift} for shift in _SHIFTS if 0 < cut + shift < len(order))
        yield from (cuts | {i} for i in range(1, len(order)) if longest[i] != longest[i - 1])

    batches = max(lanes, -(-len(order) // most))
    cuts = frozenset(len(order) * i // batches for i in range(1, batches)) - {0}
    while (better := min(near(cuts), key=time, default=cuts)) != cuts and time(better) < time(cuts):
        cuts = better
    edges = [0, *sorted(cuts), len(order)]
    return sorted((order[a:b] for a, b in pairwise(edges)), key=lambda rows: -(len(rows) * lengths[rows[-1]]))


def _lanes_for(lm: LM) -> int:
    """Lanes this model can run in now."""
    spread = getattr(lm.hf, "hf_device_map", None) is not None
    return 1 if lm.device.type != "cpu" or spread else max(1, torch.get_num_threads())


def replicate(lm: LM) -> LM:
    """The same model in other module objects: hooks on one are not on the other, the weights are shared."""
    attached, _ = lm.stack, lm.fingerprint  # known to the replica too
    lm.detach()
    try:
        shared = {id(t): t for t in (*lm.hf.parameters(), *lm.hf.buffers())}
        other = copy.copy(lm)
        other.hf = copy.deepcopy(lm.hf, shared)
    finally:
        lm.attach(*attached)
    other.find_blocks()
    return other


class _Stopped(Exception):
    """Another lane failed, or Ctrl-C: this one need not finish."""


class _Board:
    """What the lanes share: batches to do, results, the first failure, how many problems still run."""

    def __init__(self, batches: Sequence[list[int]], progress: Progress | None) -> None:
        self.todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(batches)):
            self.todo.put(i)
        self.batches, self.progress = batches, progress
        self.running = [len(b) for b in batches]
        self.failed: BaseException | None = None
        self.lock = threading.Lock()

    def progress_of(self, batch: int) -> Progress:
        """The progress of one batch, passed on with those that wait for theirs counted among the running."""

        def tell(step: int, running: int, loss: float) -> None:
            if self.failed is not None:
                raise _Stopped
            with self.lock:
                self.running[batch] = running
                if self.progress is not None:
                    self.progress(step, sum(self.running), loss)

        return tell

    def drain(self, lm: LM, work: Work[T], out: dict[int, T]) -> None:
        """Take batches until none is left or something failed."""
        while self.failed is None:
            try:
                batch = self.todo.get_nowait()
            except queue.Empty:
                return
            members = self.batches[batch]
            try:
                out.update(zip(members, work(lm, members, self.progress_of(batch)), strict=True))
                self.running[batch] = 0
            except _Stopped:
                return
            except BaseException as error:
                with self.lock:
                    self.failed = self.failed or error
                return


def in_lanes(
    lm: LM, lengths: Sequence[int], work: Work[T], progress: Progress | None = None, lanes: int | None = None, most: int = MOST_ROWS
) -> list[T]:
    """What ``work(model, members, progress)`` makes of every problem, in the problems' order.

    lengths   tokens that one step of each problem runs; batches hold problems of like length
    work      makes one result a member; ``model`` is ``lm`` or a replica of it, only for the call; it must call ``progress`` once a step
    lanes     as many as torch has threads, when not given
    most      problems in one batch

    The first error of any lane is raised here and the others stop at their next step; so does Ctrl-C.
    """
    threads = torch.get_num_threads()
    lanes = min(lanes or _lanes_for(lm), max(1, len(lengths)))
    board: _Board = _Board(plan_batches(lengths, lanes, most), progress)
    lanes = min(lanes, len(board.batches))
    out: dict[int, T] = {}
    if lanes <= 1:
        board.drain(lm, work, out)
    else:
        models = [lm, *(replicate(lm) for _ in range(lanes - 1))]

        def lane(model: LM) -> None:
            torch.set_num_threads(max(1, threads // lanes))  # of this lane only
            board.drain(model, work, out)

        crew = [threading.Thread(target=lane, args=(model,), name=f"errata-lane-{i}", daemon=True) for i, model in enumerate(models)]
        try:
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
        except BaseException as error:  # Ctrl-C reaches the main thread only
            board.failed = error
            for thread in crew:
                thread.join()
        finally:
            torch.set_num_threads(threads)  # what threads made later will start with
    if board.failed is not None:
        raise board.failed
    return [out[i] for i in range(len(lengths))]
