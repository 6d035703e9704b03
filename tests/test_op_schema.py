"""Patches whose checksums are right and whose content is not: refused where they are loaded or put on, never by what runs into them."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import forged
from laws import PROMPTS, model, patches
from ledgers import logits

from errata import registry
from errata.cli import main
from errata.core.patch import Op, Patch, Site
from errata.errors import PatchError
from errata.ledger import Ledger

BY_KIND = {
    "subspace": "baft", "low_rank": "rome", "dense": "ft-m", "codebook": "grace", "router": "melo", "routed": "melo",
    "side_memory": "wise", "key_adaptor": "rep", "context": "retrieval",
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", BY_KIND)
Change = Callable[[dict[str, Any], dict[str, Any]], object]


@functools.cache
def _saved(kind: str, root: Path) -> Path:
    return patches(BY_KIND[kind], "llama")[0].save(root / kind)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("patches")


def place(good: Path, kind: str) -> int:
    """Which op of the patch is of the kind."""
    return next(i for i, op in enumerate(Patch.load(good).ops) if op.kind == kind)


def tensor_changes(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Change]]:
    """What is wrong whatever the kind."""

    def put(value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
        return lambda head, tensors: tensors.update({name: value(tensors[name])})

    def drop(head: dict[str, Any], tensors: dict[str, Any]) -> None:
        number, _, short = name.partition(".")
        head["ops"][int(number)]["tensors"].remove(short)
        del tensors[name]

    def more(head: dict[str, Any], tensors: dict[str, Any]) -> None:
        number, _, short = name.partition(".")
        head["ops"][int(number)]["tensors"].append(short + "x")
        tensors[name + "x"] = tensors[name].clone()

    yield "missing", drop
    yield "one too many", more
    yield "of no op", lambda head, tensors: tensors.update({"9.odd": torch.ones(1)})
    yield "another axis", put(lambda t: t[None])
    yield "bool", put(lambda t: t != 0)
    yield "int8", put(lambda t: t.to(torch.int8))
    yield "complex", put(lambda t: t.to(torch.complex64))
    yield "a row more", put(lambda t: torch.cat([t, t[-1:]]))
    if tensor.ndim > 1:
        yield "a column more", put(lambda t: torch.cat([t, t[..., -1:]], -1))
    if tensor.is_floating_point():
        for value in ("nan", "inf", "-inf", "3e38", "-1e13"):
            yield value, put(lambda t, v=value: t.flatten().index_fill(0, torch.tensor([t.numel() - 1]), float(v)).view(t.shape))
        yield "empty", put(lambda t: t[:0])
    else:
        yield "negative", put(lambda t: (t - 1000).to(t.dtype) if t.dtype != torch.uint8 else t.to(torch.int16))
        yield "too large", put(lambda t: t + 10_000_000 if t.dtype != torch.uint8 else t.to(torch.int16))
        yield "real", put(lambda t: t.float())


# A row or column more of these is what the kind may hold: unused padding, a key more of a text, a memory's entries counted elsewhere.
MAY = {("context", "texts", "a column more"), ("context", "names", "a column more")}


@each_kind
def test_tensors_that_are_not_as_declared_are_refused(kind: str, root: Path, tmp_path: Path) -> None:
    base, good, count = model("llama"), _saved(kind, root), itertools.count()
    i = place(good, kind)
    for name, tensor in Patch.load(good).ops[i].tensors.items():
        for what, change in tensor_changes(f"{i}.{name}", tensor):
            if (kind, name, what) in MAY:
                continue
            with pytest.raises(PatchError) as caught:
                base.check(Patch.load(forged(good, tmp_path / str(next(count)), change)))
            assert str(caught.value), (name, what)
    assert next(count) >= 12


SETTINGS: dict[str, list[tuple[str, Any]]] = {
    "subspace": [("gate", "evil"), ("gate", "none"), ("last", -5), ("last", 0), ("last", 1.5), ("threshold", 7.0)],
    "low_rank": [],
    "dense": [],
    "codebook": [("replace", "some"), ("rounding", -1.0), ("rounding", "x")],
    "router": [("reads", "both"), ("rounding", -1e-9)],
    "routed": [("scale", "x"), ("scale", None)],
    "side_memory": [("shape", [1, 2]), ("shape", [3]), ("shape", [10**9, 10**9]), ("act", "os.system"), ("act_ratio", -1), ("long", "x")],
    "key_adaptor": [("tau", 0), ("tau", 1.0), ("tau", -3), ("gate", "yes"), ("constant", 1)],
    "context": [
        ("cue", [10**9]), ("cue", [-1]), ("cue", "x"), ("bos", 10**9), ("budget", "x"), ("demonstrations", 10**6), ("retrieval", None),
        ("retrieval", {"k": 0, "threshold": 0.5, "encoder": None, "block": 1, "pool": "last"}),
        ("retrieval", {"k": 1, "threshold": 0.5, "encoder": None, "block": 99, "pool": "last"}),
        ("retrieval", {"k": 1, "threshold": 0.5, "encoder": None, "block": 1, "pool": "all"}),
    ],
}  # fmt: skip


@each_kind
def test_settings_that_are_not_as_declared_are_refused(kind: str, root: Path, tmp_path: Path) -> None:
    base, good = model("llama"), _saved(kind, root)
    i = place(good, kind)
    own = dict(Patch.load(good).ops[i].settings)
    wrong: list[tuple[str, dict[str, Any]]] = [(f"{k}={v!r}", {**own, k: v}) for k, v in SETTINGS[kind]]
    wrong += [("unknown", {**own, "extra": 1})]
    wrong += [(f"without {k}", {n: v for n, v in own.items() if n != k}) for k in own if k != "threshold"]
    wrong += [(f"{k} is {v!r}", {**own, k: v}) for k in own for v in ({"a": 1}, "evil", float("inf")) if not isinstance(own[k], str)]
    for n, (what, settings) in enumerate(wrong):
        with pytest.raises(PatchError):
            base.check(Patch.load(forged(good, tmp_path / str(n), lambda h, _, s=settings: h["ops"][i].update(settings=s))))
            pytest.fail(f"accepted: {what}")


@each_kind
def test_sites_that_the_model_does_not_have_are_refused(kind: str, root: Path, tmp_path: Path) -> None:
    base, good = model("llama"), _saved(kind, root)
    i = place(good, kind)
    sites = [(99, None), (-1, None), (1, "mlp.nowhere"), (1, "mlp.0"), (1, ""), (1, "input_layernorm"), (1, "mlp")]
    sites += [(1, "mlp.down_proj.weight"), (1, "mlp.down_proj.forward"), (1, "self_attn..q_proj")]
    sites += [(1, "self_attn.k_proj")]  # a linear of other sizes
    sites += [] if kind == "subspace" else [(1, "block")]
    for n, (block, point) in enumerate(sites):
        change = {"block": block} if point is None else {"block": block, "point": point}
        with pytest.raises(PatchError):
            base.check(Patch.load(forged(good, tmp_path / str(n), lambda h, _, c=change: h["ops"][i].update(c))))
            pytest.fail(f"accepted: {change}")


def test_every_kind_is_declared_or_runs_only_in_training() -> None:
    for kind in registry.names("op"):
        if kind in BY_KIND or kind == "experts":  # of which tests/test_experts.py has patches
            assert registry.get("op", kind).schema is not None
        else:
            with pytest.raises(PatchError, match="runs only while an edit is made"):
                Patch("t", {}, "base", (), (Op(kind, Site(1), {"by": torch.ones(1, 1, 1)}),)).check()


def test_blocks_without_their_router_are_refused(root: Path) -> None:
    whole = patches("melo", "llama")[0]
    alone = Patch("melo", {}, whole.base, whole.requests, whole.ops[1:])
    with pytest.raises(PatchError, match="needs one router in its patch, at a lower block"):
        model("llama").check(alone)


def evil(head: dict[str, Any], tensors: dict[str, Any]) -> None:
    head["ops"][0]["settings"]["gate"] = "evil"


def narrow(head: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Broadcasts where nobody looks."""
    for name in [n for n in tensors if n.endswith((".A", ".R", ".V"))]:
        tensors[name] = tensors[name][:, :1].contiguous()


def test_a_ledger_takes_no_such_patch_and_goes_on(root: Path, tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = model("llama")
    good = Patch.load(_saved("subspace", root))
    ledger = Ledger.open(tmp_path / "book", base)
    ledger.apply_patches([good], force=True)
    live = logits(base, ledger.stack())
    for n, change in enumerate((evil, narrow)):
        folder = forged(_saved("subspace", root), tmp_path / f"bad{n}", change)
        assert main(["ledger", "apply", str(tmp_path / "book"), "--model", tiny, "--patch", str(folder), "--force"]) == 4
    ops = tuple(Op(op.kind, op.site, {k: t[:, :1] if t.ndim == 2 else t for k, t in op.tensors.items()}, op.settings) for op in good.ops)
    with pytest.raises(PatchError, match="made for an output of 1 numbers, here there are 32"):
        ledger.apply_patches([Patch("baft", {}, good.base, good.requests, ops)], force=True)
    assert len(ledger.edits()) == 1 and torch.equal(logits(base, ledger.stack()), live)
    assert ledger.check().held and ledger.blame(PROMPTS[0]).parts
    capsys.readouterr()


@pytest.mark.parametrize("change", [evil, lambda h, t: t.update({"0.b": t["0.b"].to(torch.int8)})])
def test_patch_show_says_what_is_wrong(change: Change, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = forged(_saved("subspace", root), tmp_path / "bad", change)
    assert main(["patch", "show", str(folder)]) == 4
    out, err = capsys.readouterr()
    assert not out and "the 'subspace' op at block" in err and err.count("\n") == 1


def test_a_memory_with_no_limit_for_some_keys_opens_again(tmp_path: Path) -> None:
    """GRACE writes infinity where a key's radius has no limit; such a patch was saved and could not be opened."""
    patch = patches("grace", "llama")[0]
    state = {**patch.state, "limits": torch.tensor([0.5, torch.inf], dtype=torch.float64)}
    saved = Patch(patch.method, patch.settings, patch.base, patch.requests, patch.ops, state)
    assert torch.equal(Patch.load(saved.save(tmp_path / "p")).state["limits"], state["limits"])
    with pytest.raises(PatchError, match="holds NaN or infinity"):
        Patch(patch.method, patch.settings, patch.base, patch.requests, patch.ops, {"limits": -state["limits"]}).save(tmp_path / "q")


def test_half_a_character_in_a_head_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"patch\.json: not valid JSON .*surrogates not allowed"):
        Patch.load(forged(_saved("low_rank", root), tmp_path / "p", lambda h, _: h.update(method="\ud800")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_codebook_in_half_precision_runs(dtype: torch.dtype, root: Path, tmp_path: Path) -> None:
    folder = forged(_saved("codebook", root), tmp_path / "p", lambda _, t: t.update({k: v.to(dtype) for k, v in t.items() if k[0] == "0"}))
    base = model("llama")
    assert torch.isfinite(logits(base, [Patch.load(folder)])).all()


def test_a_store_that_needs_an_encoder_says_so_when_it_is_put_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    how = {"k": 1, "threshold": 0.5, "encoder": "some/encoder", "block": 1, "pool": "last"}
    folder = forged(_saved("context", root), tmp_path / "p", lambda h, _: h["ops"][0]["settings"].update(retrieval=how))
    with pytest.raises(PatchError, match="needs the package sentence-transformers"):
        model("llama").check(Patch.load(folder))


def test_an_adaptor_with_a_constant_projection_has_one_direction() -> None:
    """Found by `scripts/fuzz_files.py`: with more, its op would multiply what does not fit."""
    shapes = {"a": (2, 3, 8), "u": (2, 8, 3), "w1": (2, 4, 8), "b1": (2, 4), "w2": (2, 4), "b2": (2,)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    settings = {"tau": 0.5, "gate": True, "constant": True}
    with pytest.raises(PatchError, match="constant goes with one direction, and it has 3"):
        Patch("rep", {}, "base", (), (Op("key_adaptor", Site(1, "mlp_down"), tensors, settings),)).check()
    one = {name: t[:, :1] if name == "a" else t[..., :1] if name == "u" else t for name, t in tensors.items()}
    Patch("rep", {}, "base", (), (Op("key_adaptor", Site(1, "mlp_down"), one, settings),)).check()
