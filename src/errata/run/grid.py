"""What a run file says: model × methods × benchmark × scenario × seeds, checked before anything is loaded.

model: almanac                       # or {name, dtype, device, device_map, revision}; a list for several
methods:                             # names (one's own as "module:Class"), or {name, label, set}
  - none
  - {name: baft, label: baft-r4, set: {rank: 4}}
benchmark: {name: almanac, split: test, n: 100}     # data: a local file, where the benchmark needs one; a list for several
scenario: {kind: continual, marks: [1, 10, 100]}    # or single, or "batched(10)"; a list for several
seeds: [0]                           # of the editor, and of the order of the cases where the benchmark names none
guard: {every: 100, action: warn}    # see `errata.run.guard.GuardSpec`; without it nothing is looked at
score: {right_after: true, free_tokens: false, fluency: false, robustness: false, watch: null, latency: true, judges: [contains]}
       # known: only cases whose fact the base knows; without it, as the benchmark has it (CounterFact and its kin: true)
store: {group: 16, chunk: 256, patches: keep}
chat: true                           # edit and ask in the model's chat template; without it, plainly
threads: 1                           # of torch in each worker; without it, the machine's share of each
gpus: 1                              # that a cell takes on a Ray cluster; without it, one where there are any
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from errata import registry
from errata.benchmarks.files import open_benchmark
from errata.config import build, digest, parse_sets, read_yaml, to_dict
from errata.errors import ConfigError, UnknownNameError, shortened
from errata.methods.base import settings_for
from errata.run.guard import GuardSpec
from errata.run.specs import ScoreSpec, StoreSpec

CASES = 100  # where the run file does not say
_BATCHED = re.compile(r"batched\(([0-9]{1,9})\)")
_VERBS = {"method": "edit_each", "benchmark": "load"}  # what a class of one's own must have
_YOUNGER = ("chat", "consistent")
_MANY = ("model", "methods", "benchmark", "scenario", "seeds")  # one, or a list


@dataclass(frozen=True)
class ModelSpec:
    """What `errata.load` is given.  ``device_map``: accelerate's, for a model larger than one device ("auto")."""

    name: str
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class MethodSpec:
    """A method with settings; ``label`` names it in records and tables (its own name without one)."""

    name: str
    label: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkSpec:
    """Which cases, in which order.

    data   its file, folder or hub name, where it is not in the package; ``split`` of it (None: test, or the one file)
    n      cases, or "all" (None: 100, or as many as there are)
    seed   of the order, or "file" for the file's own (None: the cell's seed)
    consistent  one case a fact, where a file edits some facts twice (`errata.benchmarks.streams`)
    """

    name: str
    data: str | None = None
    split: str | None = None
    n: int | Literal["all"] | None = None
    seed: int | Literal["file"] | None = None
    consistent: bool = False


@dataclass(frozen=True)
class ScenarioSpec:
    """single; batched (joint edits of ``size`` requests); continual.  ``marks``: T at which all edits so far are scored; without them
    the end, and in continual mode the powers of ten before it."""

    kind: Literal["single", "batched", "continual"]
    size: int | None = None
    marks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.kind == "batched") != (self.size is not None):
            raise ConfigError(f"scenario {self.kind}: " + ("give size" if self.size is None else "size has no meaning here; use batched"))
        if self.size is not None and self.size < 1:
            raise ConfigError(f"a batch holds at least one edit, not {self.size}")
        if self.kind == "single" and self.marks is not None:
            raise ConfigError("scenario single: marks have no meaning here; each edit stands alone")

    @property
    def title(self) -> str:
        return f"batched({self.size})" if self.kind == "batched" else self.kind

    def at(self, cases: int) -> tuple[int, ...]:
        """The marks with so many cases."""
        if self.marks is not None:
            return self.marks
        powers = (10**i for i in range(9)) if self.kind == "continual" else ()
        return (*(t for t in powers if t < cases), cases)


@dataclass(frozen=True)
class RunSpec:
    """A run file."""

    methods: tuple[MethodSpec, ...]
    model: tuple[ModelSpec, ...] = (ModelSpec("almanac"),)
    benchmark: tuple[BenchmarkSpec, ...] = (BenchmarkSpec("almanac"),)
    scenario: tuple[ScenarioSpec, ...] = (ScenarioSpec("single"),)
    seeds: tuple[int, ...] = (0,)
    guard: GuardSpec | None = None
    score: ScoreSpec = field(default_factory=ScoreSpec)
    store: StoreSpec = field(default_factory=StoreSpec)
    threads: int | None = None
    gpus: int | None = None
    chat: bool = False

    @property
    def digest(self) -> str:
        """Names everything in the file that results depend on.  What is younger than some runs counts where it is given."""
        values = {**_hashed(self), "benchmark": list(map(_hashed, self.benchmark))}
        return digest(values | {"score": {k: v for k, v in values["score"].items() if v is not None}})


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    model: ModelSpec
    method: MethodSpec
    benchmark: BenchmarkSpec
    scenario: ScenarioSpec
    seed: int

    @property
    def order(self) -> int | None:
        """The seed its cases are dealt with; None for the file's own order."""
        seed = self.benchmark.seed
        return self.seed if seed is None else seed if isinstance(seed, int) else None

    @property
    def base(self) -> str:
        """Names model and cases: cells with the same share what the unedited model says."""
        return _slug(Path(self.model.name).name, self.benchmark.name, f"o{self.order}") + "-" + self._named((self.model, self.benchmark))

    @property
    def id(self) -> str:
        """The name of its folder."""
        said = (Path(self.model.name).name, self.method.label, self.benchmark.name, self.scenario.title, f"s{self.seed}")
        return _slug(*said) + "-" + self._named((self.model, self.method, self.benchmark, self.scenario))

    def _named(self, specs: Sequence[Any]) -> str:
        return digest([_hashed(s) for s in specs] + [self.seed if len(specs) > 2 else self.order])[:6]

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @property
    def wanted(self) -> int | None:
        """How many cases; None for all."""
        return CASES if self.benchmark.n is None else self.benchmark.n if isinstance(self.benchmark.n, int) else None

    def cases(self, source: Any = None, every: bool = False) -> list[Any]:
        """The benchmark's, in this cell's order; ``every``: all, to choose from; ``source``: the benchmark, where it is open already."""
        spec, source = self.benchmark, source or benchmark(self.benchmark)
        split = spec.split or (
            None if getattr(source, "needs_data", False) or "test" not in getattr(source, "splits", ("test",)) else "test"
        )
        found = source.load(split, spec.n if isinstance(spec.n, int) and not every else None, self.order)
        return list(itertools.islice(found, CASES) if spec.n is None and not every else found)


def _hashed(spec: Any) -> dict[str, Any]:
    """A run file or a part of it as hashes take it: what is younger than some runs counts where it is given."""
    return {k: v for k, v in to_dict(spec).items() if k not in _YOUNGER or v}


def only_known(spec: RunSpec, cell: Cell) -> bool:
    """Whether the cell edits only facts that the base knows."""
    asked = spec.score.known
    return bool(getattr(_class("benchmark", cell.benchmark.name), "only_known", False)) if asked is None else asked


def benchmark(spec: BenchmarkSpec) -> Any:
    """The benchmark, on its own data or on those named."""
    if ":" in spec.name:
        made = _class("benchmark", spec.name)
        try:
            found = made() if spec.data is None else made(spec.data)
        except TypeError as error:
            raise ConfigError(f"the benchmark {spec.name!r} cannot be opened: {error}; data is what it is given") from None
        if spec.consistent:
            raise ConfigError(f"the benchmark {spec.name!r} is not one of errata's; let it give one case a fact itself, not by consistent")
    else:
        found = open_benchmark(spec.name, spec.data, spec.consistent)
    if getattr(found, "kind", "edits") != "edits":
        raise ConfigError(f"the benchmark {spec.name!r} has no edits to make; `errata score --benchmark {spec.name}` scores patches on it")
    return found


def _class(kind: str, name: str) -> Any:
    """A registered method or benchmark, or one's own as "module:Class"; nothing else is called."""
    if ":" not in name:
        return registry.get(kind, name)
    found, verb = registry.own(kind, name), _VERBS[kind]
    fits = isinstance(found, type) and callable(getattr(found, verb, None)) and (kind != "method" or dataclasses.is_dataclass(found))
    if not fits:
        raise ConfigError(f"{kind} {name!r} is none: that is a class with {verb}(){', a dataclass' if kind == 'method' else ''}")
    return found


def _slug(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_.") or "x" for part in parts)


def read(path: str | Path, sets: Iterable[str] = ()) -> RunSpec:
    """A run file, with ``--set`` on top: ``benchmark.n=10``, ``methods.baft-r4.rank=6``, ``scenario.0.marks=[1,5]``."""
    values = _in_full(read_yaml(path))
    try:
        for key, value in parse_sets(sets).items():
            _set(values, key, value)
        return _checked(build(RunSpec, _in_full(values), "run"))
    except (ConfigError, UnknownNameError) as error:
        raise type(error)(f"{path}: {error}") from None


def _in_full(values: dict[str, Any]) -> dict[str, Any]:
    """Lists where there may be several, mappings where a name was enough."""
    out: dict[str, Any] = {key: [value] if key in _MANY and not isinstance(value, list) else value for key, value in values.items()}
    for key, read_one in (("model", _named), ("methods", _named), ("benchmark", _named), ("scenario", _scenario)):
        out |= {key: [read_one(v) for v in out[key]]} if key in out else {}
    if isinstance(out.get("score"), dict) and isinstance(out["score"].get("judges"), list):
        out["score"] = {**out["score"], "judges": [_named(j) for j in out["score"]["judges"]]}
    return out


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _scenario(value: Any) -> Any:
    if isinstance(value, str):
        found = _BATCHED.fullmatch(value.replace(" ", ""))
        return {"kind": "batched", "size": int(found[1])} if found else {"kind": value}
    return value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Put one ``--set`` in its place; a list's entries go by label, name or kind, or by number, and one that is alone needs neither."""
    first, *path = key.split(".")
    at: Any = values
    steps = [first, *path]
    while steps:
        step = steps.pop(0)
        if isinstance(at, list):
            names = [str(v.get("label") or v.get("name") or v.get("kind")) if isinstance(v, Mapping) else "" for v in at]
            if step in names or (step.isdigit() and int(step) < len(at)):
                at = at[names.index(step) if step in names else int(step)]
                continue
            if len(at) != 1:
                raise ConfigError(f"--set {key}: {step!r} is none of {', '.join(names)}")
            steps, at = [step, *steps], at[0]
            continue
        if not isinstance(at, dict):
            raise ConfigError(f"--set {key}: there is nothing to set below {shortened(at)}")
        if "name" in at and first == "methods" and step not in ("name", "label", "set"):
            at = at.setdefault("set", {})
            if not isinstance(at, dict):
                raise ConfigError(f"--set {key}: there is nothing to set below {shortened(at)}")
        if not steps:
            at[step] = value
            return
        at = at.setdefault(step, {} if step != first or first not in _MANY else [{}])
    raise ConfigError(f"--set {key}: name a setting of it")


def _checked(spec: RunSpec) -> RunSpec:
    """Labels filled in; `ConfigError` for what cannot be run."""
    for key in ("methods", "model", "benchmark", "scenario", "seeds"):
        if not getattr(spec, key):
            raise ConfigError(f"{key} is empty; give at least one")
    for kind, names in (("method", [m.name for m in spec.methods]), ("benchmark", [b.name for b in spec.benchmark])):
        for name in names:
            _class(kind, name)
    labels = [m.label or m.name for m in spec.methods]
    for key, names in (("label", labels), ("seed", list(map(str, spec.seeds)))):
        if twice := [n for i, n in enumerate(names) if n in names[:i]]:
            raise ConfigError(f"two entries have the {key} {twice[0]!r}; give each its own")
    for key in ("model", "benchmark", "scenario"):
        given = getattr(spec, key)
        if twice := [v for i, v in enumerate(given) if v in given[:i]]:
            raise ConfigError(f"{key}: {getattr(twice[0], 'name', '') or twice[0].title} stands there twice; leave one out")
    if spec.chat and spec.score.fluency:
        raise ConfigError("score.fluency samples texts that go on from plain prompts; leave it or chat out")
    if spec.threads is not None and spec.threads < 1:
        raise ConfigError(f"threads must be at least 1, not {spec.threads}")
    values = to_dict(spec)
    values["methods"] = [{**m, "label": label} for m, label in zip(values["methods"], labels, strict=True)]
    return build(RunSpec, values, "run")


def from_dict(values: Mapping[str, Any]) -> RunSpec:
    """The inverse of `errata.config.to_dict`."""
    return build(RunSpec, values, "run")


def cells(spec: RunSpec) -> list[Cell]:
    """The grid; methods of one model, benchmark, scenario and seed stand together."""
    product = itertools.product(spec.model, spec.benchmark, spec.scenario, spec.seeds, spec.methods)
    return [Cell(m, method, b, s, seed) for m, b, s, seed, method in product]


def editor(cell: Cell, fingerprint: str | None = None) -> Any:
    """The cell's method with its preset for this model and its settings.  It needs no model; with the ``fingerprint`` of one, what
    `errata tune` found for it counts."""
    values = settings_for(made := _class("method", cell.method.name), cell.model.name, cell.method.set, fingerprint)
    if "seed" in {f.name for f in dataclasses.fields(made)} and "seed" not in cell.method.set:
        values["seed"] = cell.seed
    return build(made, values, f"methods.{cell.method.label}")
