"""The locate-then-edit family against its closed forms in float64: one edit and several, on a stack, and with every option."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from locating import REQUESTS, TIGHT, base, job, linear, make
from torch import Tensor

from errata.core.patch import Patch, Site
from errata.core.read import read_activations, truncate
from errata.core.tail import Tail
from errata.core.weights import delta_weight, sizes
from errata.errors import ConfigError, FitError, InputError
from errata.methods.locate.alphaedit import AlphaEdit
from errata.methods.locate.conditioning import pruned, rected, weight
from errata.methods.locate.editor import LocateEditor
from errata.methods.locate.emmet import EMMET
from errata.methods.locate.memit import LAMBDA_PER_INPUT, MEMIT, PMET
from errata.methods.locate.rome import ROME, RROME
from errata.methods.locate.run import LocateThenEditRun
from errata.methods.locate.solve import ridge_rows, small_side
from errata.request import EditRequest
from errata.text.statistics import Moments, moments

three = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])


def keys_of(found: LocateThenEditRun, block: int) -> Tensor:
    """The averaged keys [N, I] of the unedited model."""
    return found.average(found.read_keys(block, [[] for _ in found.problems])[0])


@functools.cache
def second(family: str, block: int) -> Moments:
    return moments(base(family), [Site(block, "mlp_down")], tokens=1500)[Site(block, "mlp_down")]


@three
def test_rome_writes_its_value_exactly(family: str) -> None:
    """Ŵ k = v* at the bare prompt, where u comes from the averaged key; the update is rank one along C⁻¹k*."""
    found, (patch,) = job(family, make(ROME, layers=[1]), [REQUESTS[:1]])
    (op,) = patch.ops
    w, bias = linear(base(family), 1)
    placed = found.placed[0][0]
    k = read_activations(base(family), [truncate(placed.row, placed.at)], [Site(1, "mlp_down")])[Site(1, "mlp_down")][0][0]
    torch.testing.assert_close((w + delta_weight(op)) @ k + bias, found.goal[0], **TIGHT)
    with base(family).under(patch):
        said = read_activations(base(family), [truncate(placed.row, placed.at)], [Site(1, "mlp_down")], on=base(family).stack)[
            Site(1, "mlp_down")
        ][1][0]
    torch.testing.assert_close(said, found.goal[0], **TIGHT)
    u = torch.linalg.solve(second(family, 1).second_moment.double(), keys_of(found, 1)[0])
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(op.tensors["down"][0], u, dim=0), torch.ones((), dtype=torch.float64))
    assert not torch.allclose(found.goal[0], found.start[0], atol=1e-2)


@three
def test_r_rome_is_exact_at_the_key_it_uses(family: str) -> None:
    found, (patch,) = job(family, make(RROME, layers=[1]), [REQUESTS[:1]])
    w, bias = linear(base(family), 1)
    torch.testing.assert_close((w + delta_weight(patch.ops[0])) @ keys_of(found, 1)[0] + bias, found.goal[0], **TIGHT)
    _, (prompt,) = job(family, make(RROME, layers=[1], key="prompt"), [REQUESTS[:1]])
    _, (bare,) = job(family, make(ROME, layers=[1], prefixes=[]), [REQUESTS[:1]])
    k = keys_of(job(family, make(ROME, layers=[1], prefixes=[]), [REQUESTS[:1]])[0], 1)[0]
    for p in (prompt, bare):  # with one key both are the same formula
        u = torch.linalg.solve(second(family, 1).second_moment.double(), k)
        torch.testing.assert_close(p.ops[0].tensors["down"][0], u / (u @ k), **TIGHT)


@three
def test_emmet_without_ridge_writes_every_value_and_one_edit_is_rome(family: str) -> None:
    editor = make(EMMET, layers=[1], emmet_lambda=0.0)
    found, (patch,) = job(family, editor, [REQUESTS])
    change = delta_weight(patch.ops[0])
    goal = found.goal - found.start
    torch.testing.assert_close(keys_of(found, 1) @ change.T, goal, **TIGHT)
    _, (scaled,) = job(family, make(EMMET, layers=[1], emmet_lambda=0.0, mom2_weight=1000.0), [REQUESTS])
    torch.testing.assert_close(delta_weight(scaled.ops[0]), change, atol=1e-9, rtol=1e-7)  # the scale of C cancels
    assert patch.ops[0].tensors["down"].shape[0] == len(REQUESTS)
    same = {"layers": [1], "v_decay": 0.0, "clamp": 1e6}  # ‖v_0‖ differs: the block's output there, the MLP's here
    _, (one,) = job(family, make(EMMET, **same), [REQUESTS[:1]])
    _, (rome,) = job(family, make(RROME, prefixes=[], **same), [REQUESTS[:1]])
    _, (bare,) = job(family, make(EMMET, prefixes=[], **same), [REQUESTS[:1]])
    torch.testing.assert_close(delta_weight(bare.ops[0]), delta_weight(rome.ops[0]), atol=1e-9, rtol=1e-7)
    _, (ridged,) = job(family, make(EMMET, single_ridge=True, **same), [REQUESTS[:1]])
    assert torch.linalg.norm(delta_weight(ridged.ops[0])) < torch.linalg.norm(delta_weight(one.ops[0]))


@three
def test_emmet_with_ridge_is_the_stated_formula(family: str) -> None:
    found, (patch,) = job(family, make(EMMET, layers=[1], mom2_weight=2.0, emmet_lambda=0.5, norm_lambda=0.3), [REQUESTS])
    c = 2.0 * second(family, 1).second_moment.double() + 0.3 * torch.eye(second(family, 1).second_moment.shape[0], dtype=torch.float64)
    k = keys_of(found, 1).T
    inverse = torch.linalg.inv(c)
    d = k.T @ inverse @ k + 0.5 * torch.eye(len(REQUESTS), dtype=torch.float64)
    want = (found.goal - found.start).T @ torch.linalg.inv(d) @ k.T @ inverse
    torch.testing.assert_close(delta_weight(patch.ops[0]), want, atol=1e-9, rtol=1e-6)


@three
def test_memit_writes_the_stated_fraction(family: str) -> None:
    """One block, one edit: Δk = s/(1+s) (z − Wk), s = kᵀC⁻¹k/λ; many edits: the formula with a full inverse."""
    found, (patch,) = job(family, make(MEMIT, layers=[1], mom2_weight=20.0), [REQUESTS[:1]])
    k, c = keys_of(found, 1)[0], second(family, 1).second_moment.double()
    s = k @ torch.linalg.solve(c, k) / 20.0
    torch.testing.assert_close(delta_weight(patch.ops[0]) @ k, s / (1 + s) * (found.goal - found.start)[0], **TIGHT)
    found, (patch,) = job(family, make(MEMIT, layers=[1]), [REQUESTS])
    k = keys_of(found, 1).T
    weight_ = LAMBDA_PER_INPUT * len(k)
    want = (found.goal - found.start).T @ k.T @ torch.linalg.inv(weight_ * c + k @ k.T)
    torch.testing.assert_close(delta_weight(patch.ops[0]), want, **TIGHT)


@three
@pytest.mark.parametrize(("cls", "power"), [(MEMIT, 1.0), (PMET, 0.5)])
def test_each_block_sees_those_before_it(family: str, cls: type[LocateEditor], power: float) -> None:
    """Blocks 0, 1, 2 one after the other: residual over what is left, keys and outputs under what has been written."""
    editor = make(cls, layers=[0, 1, 2], mom2_weight=0.5)
    found, (patch,) = job(family, editor, [REQUESTS])
    written: tuple[Patch, ...] = ()
    for i, op in enumerate(patch.ops):
        again = LocateThenEditRun(editor, base(family), [REQUESTS], written, Tail)
        again.placed, again.before, again.value_sites = found.placed, found.before, found.value_sites
        keys = again.average(again.read_keys(op.site.block, [[]])[0])
        now = again.read_bare(found.value_sites[0], [[]])
        m = moments(base(family), [op.site], tokens=1500)[op.site]
        gram = 0.5 * m.second_moment.double() + keys.T @ keys
        want = ((found.goal - now) / (3 - i) ** power).T @ keys @ torch.linalg.inv(gram)
        torch.testing.assert_close(delta_weight(op), want, atol=1e-9, rtol=1e-6)
        written = (*written, Patch("test", {}, base(family).fingerprint, (), (op,)))
    # with almost no weight on what is to be kept, everything that is left is written by the last block
    found, (patch,) = job(family, make(MEMIT, layers=[0, 1, 2], mom2_weight=1e-9, prefixes=[]), [REQUESTS])
    found.on = (patch,)
    torch.testing.assert_close(found.read_bare(found.value_sites[0], [[]]), found.goal, atol=1e-5, rtol=1e-5)


@three
def test_alphaedit_stays_in_the_null_space_and_solves_its_objective(family: str) -> None:
    editor = make(AlphaEdit, layers=[1], share=0.5, l2=0.1)
    _, (earlier,) = job(family, editor, [REQUESTS[2:]])
    found, (patch,) = job(family, editor, [REQUESTS[:2]], (earlier,))
    assert patch.notes["null space"].startswith("block 1: 50.")
    change, m = delta_weight(patch.ops[0]), second(family, 1)
    u0 = m.null_space(share=0.5)
    p = u0 @ u0.T
    torch.testing.assert_close(change @ p, change, **TIGHT)
    again = LocateThenEditRun(editor, base(family), [REQUESTS[:2]], (earlier,), Tail)
    again.placed, again.before = found.placed, found.before
    k = again.average(again.read_keys(1, [[]])[0]).T  # under the earlier edit
    kept = earlier.state["keys.1"].T
    r = (found.goal - found.start).T
    eye = torch.eye(len(k), dtype=torch.float64)
    torch.testing.assert_close(change, r @ k.T @ p @ torch.linalg.inv(kept @ kept.T @ p + k @ k.T @ p + 0.1 * eye), atol=1e-9, rtol=1e-6)
    x = torch.zeros_like(change).copy_(change).requires_grad_()
    cost = (x @ p @ k - r).square().sum() + 0.1 * (x @ p).square().sum() + (x @ p @ kept).square().sum()
    (gradient,) = torch.autograd.grad(cost, x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-8, rtol=0)


def test_alphaedit_leaves_preserved_keys_alone_where_the_null_space_is_exact() -> None:
    model, site = base("llama"), Site(1, "mlp_down")
    generator = torch.Generator().manual_seed(0)
    size = linear(model, 1)[0].shape[1]
    k0 = torch.randn(size, 20, dtype=torch.float64, generator=generator)
    m = Moments(site, k0 @ k0.T / 20, 20, model.fingerprint, "made")
    editor = make(AlphaEdit, layers=[1], threshold=1e-8)
    keys = torch.randn(3, size, dtype=torch.float64, generator=generator)
    (down,) = editor.down_factors(m, keys, keys, [[0, 1, 2]], None)
    torch.testing.assert_close(down @ k0, torch.zeros(3, 20, dtype=torch.float64), atol=1e-9, rtol=0)
    assert m.null_space(1e-8).shape[1] == size - 20
    with pytest.raises(ConfigError, match=r"no direction of block 1.*raise threshold"):
        make(AlphaEdit, layers=[1], threshold=1e-300).down_factors(Moments(site, torch.eye(size), 9, "", ""), keys, keys, [[0]], None)


def test_history_comes_from_the_stack() -> None:
    """An earlier edit is stayed clear of while it is on the stack, and forgotten once it is taken back."""
    editor = make(AlphaEdit, layers=[1], share=0.9, l2=1e-3)
    _, (first,) = job("llama", editor, [REQUESTS[:1]])
    _, (alone,) = job("llama", editor, [REQUESTS[1:2]])
    _, (after,) = job("llama", editor, [REQUESTS[1:2]], (first,))
    _, (undone,) = job("llama", editor, [REQUESTS[1:2]])
    assert undone.id == alone.id != after.id
    _, (careless,) = job("llama", make(AlphaEdit, layers=[1], share=0.9, l2=1e-3, history=False), [REQUESTS[1:2]], (first,))
    past = first.state["keys.1"].T
    assert (delta_weight(after.ops[0]) @ past).norm() < 0.2 * (delta_weight(careless.ops[0]) @ past).norm()


def test_small_sides_equal_the_full_systems() -> None:
    generator = torch.Generator().manual_seed(1)
    for n, size in ((3, 20), (20, 20), (40, 20)):
        k = torch.randn(n, size, dtype=torch.float64, generator=generator)
        a = torch.randn(size, 2 * size, dtype=torch.float64, generator=generator)
        c = a @ a.T
        got = small_side(k, torch.linalg.solve(c, k.T).T, 0.7)
        torch.testing.assert_close(got, k @ torch.linalg.inv(0.7 * c + k.T @ k), **TIGHT)
        past = torch.randn(5, size, dtype=torch.float64, generator=generator)
        full = torch.linalg.inv(k.T @ k + past.T @ past + 0.3 * torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(ridge_rows(k, past, 0.3), k @ full, **TIGHT)


# -- several edits, stacks, options -------------------------------------------------------------------------------------


def test_rome_writes_several_requests_one_after_the_other() -> None:
    editor, model = make(ROME, layers=[1]), base("llama")
    joint = editor.edit(model, REQUESTS)
    stack: tuple[Patch, ...] = ()
    for request in REQUESTS:
        stack = (*stack, editor.edit(model, [request], on=stack))
    torch.testing.assert_close(delta_weight(joint.ops[0]), sum(delta_weight(p.ops[0]) for p in stack), **TIGHT)
    assert joint.requests == tuple(REQUESTS) and joint.method == "rome" and not joint.replaces


def test_two_requests_with_one_key_are_a_clear_error_where_values_must_be_exact() -> None:
    twice = [REQUESTS[0], EditRequest("The capital of France is", "Madrid", "France")]
    with pytest.raises(FitError, match="two requests have the same key"):
        make(EMMET, layers=[1], emmet_lambda=0.0, v_steps=2, mom2_adjustment=False).edit(base("llama"), twice)


def test_a_change_has_no_more_factors_than_edits_or_dimensions() -> None:
    model = base("llama")
    many = [EditRequest(f"The capital of France {i} is", "Rome", "France") for i in range(40)]
    (op,) = make(MEMIT, layers=[1], v_steps=2, prefixes=[]).edit(model, many).ops
    assert sizes(op)[0] <= 32 and delta_weight(op).shape == linear(model, 1)[0].shape
    (few,) = make(MEMIT, layers=[1], v_steps=2, prefixes=[]).edit(model, many[:2]).ops
    assert few.tensors["down"].shape[0] == 2


@pytest.mark.parametrize("options", [{"rect": 0.2}, {"prune": "log"}, {"prune": "linear"}, {"norm_constraint": 1e-3}])
def test_conditioning_options(options: dict[str, object]) -> None:
    model = base("gpt2")
    plain = make(ROME, layers=[1]).edit(model, REQUESTS[:1])
    (op,) = make(ROME, layers=[1], **options).edit(model, REQUESTS[:1]).ops
    change, got, w = delta_weight(plain.ops[0]), delta_weight(op), weight(model, Site(1, "mlp_down"))
    torch.testing.assert_close(w, linear(model, 1)[0])
    if "rect" in options:
        assert int((got != 0).sum()) == round(0.2 * change.numel())
        assert (change / w).abs()[got != 0].min() >= (change / w).abs()[got == 0].max()
        torch.testing.assert_close(got[got != 0], change[got != 0])
    elif "prune" in options:
        top = torch.linalg.matrix_norm(w, 2)
        ours, before = torch.linalg.svdvals(got)[0], torch.linalg.svdvals(change)[0]
        assert before <= top or top <= ours < before
    else:
        torch.testing.assert_close(got, change.clamp(-1e-3, 1e-3))


def test_prune_and_rect_by_hand() -> None:
    change = torch.diag(torch.tensor([8.0, 4.0, 1.0], dtype=torch.float64))
    top = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(pruned(change, top, "linear", 2.0).diagonal(), torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(pruned(change, top, "log", 2.0).diagonal(), torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64))
    kept = rected(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0], [1.0, 1.0]]), 0.5)
    assert kept.tolist() == [[0.0, 0.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("cls", "settings", "request_", "error", "message"),
    [
        (ROME, {"layers": (9,)}, REQUESTS[0], ConfigError, "block 9 does not exist"),
        (ROME, {"layers": (0, 1)}, REQUESTS[0], ConfigError, "edits one block"),
        (EMMET, {"layers": (0, 1)}, REQUESTS[0], ConfigError, "edits one block"),
        (MEMIT, {"layers": (2, 1)}, REQUESTS[0], ConfigError, "must name at least one block and rise"),
        (MEMIT, {"mom2_weight": 0.0}, REQUESTS[0], ConfigError, "mom2_weight must be positive"),
        (AlphaEdit, {"mom2_adjustment": False}, REQUESTS[0], ConfigError, "needs the second moments"),
        (AlphaEdit, {"share": 2.0}, REQUESTS[0], ConfigError, "share above 0"),
        (ROME, {"prefixes": ((0, 1),)}, REQUESTS[0], ConfigError, "prefixes are pairs"),
        (ROME, {"rect": 0.0}, REQUESTS[0], ConfigError, "rect is the share"),
        (ROME, {"v_steps": 0}, REQUESTS[0], ConfigError, "at least 1"),
        (ROME, {}, EditRequest("The capital of France is", "Rome"), InputError, "give the subject of 'The capital of France is'"),
        (ROME, {"stats": "no/such/file.txt"}, REQUESTS[0], InputError, "no such text"),
    ],
)
def test_settings_and_requests_that_cannot_work(cls, settings, request_, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        cls(**{"stats_tokens": 1500, **settings}).edit(base("llama"), [request_])


@pytest.mark.parametrize(("family", "want"), [("llama", 4.0), ("gemma2", 0.5), ("gpt2", 4.0)])
def test_a_value_before_a_norm_is_held_shorter(family: str, want: float) -> None:
    """Behind the MLP of Gemma 2 and 3 a norm takes a longer value's length away, and neighbours would get its change of the matrix."""
    for kind in (ROME, MEMIT, PMET):
        assert kind(layers=(1,)).objective(base(family)).clamp == kind(layers=(1,)).clamp_on(base(family)) == want
        assert kind(layers=(1,), clamp=2.5).objective(base(family)).clamp == 2.5


@pytest.mark.parametrize("kind", [MEMIT, AlphaEdit])
@pytest.mark.parametrize(("family", "alone"), [("gemma3_text", True), ("olmo2", True), ("llama", False)])
def test_what_one_block_alone_writes_is_written_whole(kind: Any, family: str, alone: bool) -> None:
    """Several blocks share out a ridge's remainder.  Where a norm follows the MLP one block is edited, and MEMIT's ridge left 96 of 100
    values of Gemma 3 unwritten; the patch says which ridge it was made with."""
    model = base(family)
    editor = kind(stats_tokens=1500, v_steps=3, kl=0.0, **({"share": 0.9} if kind is AlphaEdit else {}))
    blocks = editor.target_layers(model)
    assert not alone or blocks == (int(model.depth * 5 / 32 + 0.5),)
    patch = editor.edit(model, [REQUESTS[0]])
    name = "l2" if kind is AlphaEdit else "mom2_weight"
    used, plain = patch.settings[name], editor.alone(model)
    assert (used is not None) is alone and (not alone or used == getattr(plain, name))
    given = replace(editor, **{name: 7.0})
    assert given.alone(model) == given and given.edit(model, [REQUESTS[0]]).settings[name] == 7.0
    if alone:
        own = LocateThenEditRun(editor, model, [[REQUESTS[0]]], (), Tail)
        own.moments = own.editor.prepare(model)
        own.place()
        key = own.average(own.read_keys(blocks[0], [[]])[0])[0].double()
        shares = [float(op.tensors["down"].double() @ key) for p in (patch, given.edit(model, [REQUESTS[0]])) for op in p.ops]
        assert 0.4 < shares[0] <= 1 + 1e-6 and shares[1] < shares[0]  # AlphaEdit writes along a part of the key only
