"""Who runs the cells: this process one after another, N processes, or a Ray cluster.  All call `run_cell`: the records are the same.

A worker that is lost (killed, out of memory, its machine gone) costs its cell what was not on disk, and the cell is tried again; an error
costs its cell and the others go on.  Only a disk that cannot be written ends the run at once: nothing more could be kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from errata.core.loading import load
from errata.core.model import LM
from errata.errors import ConfigError, DiskError, ErrataError, ModelError, StorageError, first_line
from errata.run import base_answers, grid, manifest
from errata.run.cell import CellRunner
from errata.run.folder import Journal, complete, locked, read_document
from errata.run.parts import Progress

_RETRIES = 2  # more tries of a cell whose worker was lost


@dataclass(frozen=True)
class Outcome:
    """``error`` is empty for a cell that is complete; ``code`` is its exit code; ``disk``: because a disk could not be written."""

    cell: str
    error: str = ""
    code: int = 0
    disk: bool = False


OnOutcome = Callable[[Outcome], None]


@functools.lru_cache(maxsize=1)
def _model(spec: grid.ModelSpec) -> LM:
    """The model of the last cell stays for the next."""
    more: dict[str, Any] = {k: v for k, v in (("device_map", spec.device_map), ("revision", spec.revision)) if v is not None}
    return load(spec.name, dtype=spec.dtype, device=spec.device, **more)


def run_cell(root: str, name: str, base_only: bool = False, progress: Progress | None = None) -> Outcome:
    """Run one cell of the run in ``root``, or only ask the base what the cell will need; errors become the outcome."""
    folder = Path(root) / "cells" / name
    try:
        kept = read_document(Path(root) / manifest.NAME)
        spec = grid.from_dict(kept["config"])
        cell = next(c for c in grid.cells(spec) if c.id == name)
        torch.set_num_threads(int(kept["threads"]))
        began = time.perf_counter()
        lm = _model(cell.model)
        loading = time.perf_counter() - began
        if base_only:
            base = Path(root) / "base" / cell.base
            base_answers.ask(lm, base_answers.cases_of(lm, spec, cell, base), base, spec.store.chunk)
            return Outcome(name)
        CellRunner(lm, spec, cell, folder, Path(root) / "base" / cell.base, Path(root) / "judged", progress).run(loading)
        (folder / "error.txt").unlink(missing_ok=True)
        return Outcome(name)
    except ErrataError as error:
        return replace(_failed(folder, name, str(error), error.exit_code), disk=isinstance(error, DiskError))
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return _failed(folder, name, "out of memory; use a smaller model, dtype bfloat16, or a smaller store.chunk", ModelError.exit_code)
    except Exception as error:
        return _failed(folder, name, f"not foreseen: {type(error).__name__}: {first_line(error)}; see error.txt in its folder", 1)


def _failed(folder: Path, name: str, message: str, code: int) -> Outcome:
    with contextlib.suppress(OSError):  # the disk may be what failed
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(f"{message}\n\n{traceback.format_exc()}", encoding="utf-8", errors="replace")
    return Outcome(name, message, code)


def _serial(root: Path, cells: Sequence[grid.Cell], told: OnOutcome, progress: Callable[[str], Progress] | None = None) -> list[Outcome]:
    """One after another, here."""
    threads = torch.get_num_threads()
    try:
        outcomes = (run_cell(str(root), cell.id, progress=progress(cell.method.label) if progress else None) for cell in cells)
        return _collected(outcomes, told)
    finally:
        torch.set_num_threads(threads)
        _model.cache_clear()


def processes(root: Path, cells: Sequence[grid.Cell], told: OnOutcome, count: int) -> list[Outcome]:
    """``count`` at a time, a process a cell."""
    running: set[subprocess.Popen[str]] = set()
    ended = threading.Event()

    def one(name: str, base_only: bool) -> Outcome:
        command = [sys.executable, "-m", "errata.run.worker", str(root), name, *(["--base"] if base_only else [])]
        said = ""
        for _ in range(1 + _RETRIES):
            if ended.is_set():
                return Outcome(name, "not begun: the run was ended", DiskError.exit_code)
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            running.add(child)
            said, _ = child.communicate()
            running.discard(child)
            if child.returncode == 0:
                return Outcome(**json.loads(said.splitlines()[-1]))
        return Outcome(name, f"its worker was lost {1 + _RETRIES} times, last with exit code {child.returncode}", 1)

    pool = ThreadPoolExecutor(count)
    try:
        run = lambda names, base_only: (  # noqa: E731
            done.result() for done in as_completed([pool.submit(one, name, base_only) for name in names])
        )
        return _collected(_in_two_stages(cells, run), told)
    finally:
        ended.set()
        for child in list(running):
            child.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(
    root: Path, spec: grid.RunSpec, cells: Sequence[grid.Cell], told: OnOutcome, address: str | None, threads: int
) -> list[Outcome]:
    """As tasks of a Ray cluster: a local one, or the one at ``address`` (its machines must see the run's folder under the same path)."""
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError("--workers ray needs the package ray; pip install 'errata[ray]', or give a number of processes") from None
    begun = not ray.is_initialized()
    if begun:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    gpus = spec.gpus if spec.gpus is not None else int(bool(ray.cluster_resources().get("GPU")))
    task = ray.remote(num_cpus=min(threads, ray.cluster_resources().get("CPU", 1)), num_gpus=gpus, max_retries=_RETRIES)(run_cell)

    def run(names: Sequence[str], base_only: bool) -> Iterator[Outcome]:
        waiting = {task.remote(str(root), name, base_only): name for name in names}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            name = waiting.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:  # the worker is gone, and so are those that tried again
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                yield Outcome(name, f"its worker was lost {1 + _RETRIES} times ({first})", 1)

    try:
        return _collected(_in_two_stages(cells, run), told)
    finally:
        if begun:
            ray.shutdown()


def _collected(outcomes: Iterable[Outcome], told: OnOutcome) -> list[Outcome]:
    """All of them, or up to the one whose disk could not be written."""
    out = []
    for outcome in outcomes:
        out.append(outcome)
        told(outcome)
        if outcome.disk:
            break
    return out


def _in_two_stages(cells: Sequence[grid.Cell], run: Callable[[Sequence[str], bool], Iterator[Outcome]]) -> Iterator[Outcome]:
    """The base's answers first, once for all cells that share them; then the cells.  Cells whose base cannot be asked are not tried."""
    first: dict[str, str] = {}
    for cell in cells:
        first.setdefault(cell.base, cell.id)
    failed = {outcome.cell: outcome for outcome in run(list(first.values()), True) if outcome.error}
    for cell in cells:
        if first[cell.base] in failed:
            yield replace(failed[first[cell.base]], cell=cell.id)
    yield from run([cell.id for cell in cells if first[cell.base] not in failed], False)


def left(root: Path, cells: Sequence[grid.Cell]) -> list[grid.Cell]:
    """Cells that are not complete; what a stop left in those that are is removed."""
    out = []
    for cell in cells:
        folder = root / "cells" / cell.id
        if not complete(folder):
            out.append(cell)
            continue
        with contextlib.suppress(StorageError), locked(folder):  # who works in it sweeps too
            Journal(folder).sweep()
    return out


def run(
    root: Path,
    spec: grid.RunSpec,
    workers: str | int = 1,
    address: str | None = None,
    told: OnOutcome = lambda outcome: None,
    progress: Callable[[str], Progress] | None = None,
) -> list[Outcome]:
    """Every cell that is not complete yet.  ``workers``: 1 (here), a number of processes, or "ray"."""
    root = root.absolute()  # a worker may stand elsewhere
    kept = manifest.begin(root, spec, workers if isinstance(workers, int) else torch.get_num_threads())
    cells = left(root, grid.cells(spec))
    if not cells:
        manifest.complete(root)
        return []
    if workers == "ray":
        out = _on_ray(root, spec, cells, told, address, int(kept["threads"]))
    elif isinstance(workers, int) and workers > 1:
        out = processes(root, cells, told, workers)
    else:
        out = _serial(root, cells, told, progress)
    if (full := next((o for o in out if o.disk), None)) is not None:
        raise DiskError(f"{full.cell}: {full.error}")
    manifest.complete(root)
    return out
