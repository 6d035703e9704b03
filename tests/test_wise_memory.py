"""WISE's memories: TIES by hand, masks, the form they are stored in, and how they are kept and merged over a run of edits."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from side_memories import SITE

from errata.core.patch import Site
from errata.errors import ConfigError
from errata.methods.wise.memory import Memories, Memory, entries, ties
from errata.methods.wise.op import pack, packed, unpack

# -- TIES and masks --------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    deltas = torch.tensor([[3.0, -1.0, 0.5, 2.0, 0.1], [1.0, 2.0, -4.0, 0.2, -0.3], [-5.0, 0.1, 1.0, 4.0, 0.2]])
    # of 5 entries each keeps 3: [3 -1 . 2 .], [1 2 -4 . .], [-5 . 1 4 .]; sums −1, 1, −3, 6, 0
    want = torch.tensor([-5.0, 2.0, -4.0, 3.0, 0.0])
    torch.testing.assert_close(ties(deltas, [1.0, 1.0, 1.0], 0.6), want)
    # weights 3, 1, 1: sums 5, −1, −3, 10; the first entry is now (3·3 + 1) / 4, the last (3·2 + 4) / 4
    torch.testing.assert_close(ties(deltas, [3.0, 1.0, 1.0], 0.6), torch.tensor([2.5, -1.0, -4.0, 2.5, 0.0]))


def test_ties_identities() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator).double()
    torch.testing.assert_close(ties(a[None], [0.7], 1.0), a)
    same = ties(torch.stack([a, a.abs() * a.sign() * 3]), [1.0, 1.0], 1.0)  # signs agree everywhere: the mean
    torch.testing.assert_close(same, 2 * a)
    torch.testing.assert_close(ties(torch.stack([a, b]), [1.0, 3.0], 1.0), ties(torch.stack([b, a]), [0.75, 0.25], 1.0))  # order, scale
    torch.testing.assert_close(ties(torch.stack([a, b]), [0.5, 0.5], 0.4), -ties(torch.stack([-a, -b]), [0.5, 0.5], 0.4))
    apart = torch.zeros(2, 6)  # entries only one changes stay what they are, whatever its weight
    apart[0, :3], apart[1, 3:] = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-4.0, 5.0, -6.0])
    torch.testing.assert_close(ties(apart, [0.1, 0.9], 0.5), apart.sum(0))
    assert int((ties(a[None], [1.0], 0.3) != 0).sum()) == 15
    for density, weights in ((0.0, [1.0, 1.0]), (1.5, [1.0, 1.0]), (0.5, [1.0]), (0.5, [1.0, 0.0])):
        with pytest.raises(ConfigError, match="ties"):
            ties(torch.stack([a, b]), weights, density)


def test_masks() -> None:
    size = 80_000
    first, second = entries(size, 0.2, 1.0, 0, 0), entries(size, 0.2, 1.0, 0, 1)
    assert torch.equal(first, entries(size, 0.2, 1.0, 0, 0)) and not torch.equal(first, entries(size, 0.2, 1.0, 1, 0))
    assert abs(len(first) / size - 0.2) < 0.01 and bool((first.diff() > 0).all())
    both = len(set(first.tolist()) & set(second.tolist()))
    assert abs(both / size - 0.04) < 0.01  # drawn independently
    pool = entries(size, 1.0, 0.125, 0, 0)
    assert len(pool) == size // 8 and torch.equal(pool, entries(size, 1.0, 0.125, 0, 5))  # exactly an eighth, the same for every mask
    inside = [entries(size, 0.2, 0.125, 0, i) for i in (0, 1)]
    assert all(set(m.tolist()) <= set(pool.tolist()) for m in inside) and not torch.equal(*inside)
    assert abs(len(inside[0]) / len(pool) - 0.2) < 0.02
    with pytest.raises(ConfigError, match="none of 10 weights"):
        entries(10, 1e-9, 1.0, 0, 0)


@pytest.mark.parametrize(("ratio", "form"), [(0.5, "bits"), (0.04, "bits"), (0.02, "index"), (1.0, "bits")])
def test_the_smaller_of_two_forms_is_stored(ratio: float, form: str) -> None:
    for size in (4096, 4099):
        where = entries(size, ratio, 1.0, 0, 0)
        kept = pack(where, torch.ones(len(where)), size)
        assert sorted(kept) == sorted(["values", form]) and torch.equal(unpack(kept), where)
        other = 4 * len(where) if form == "bits" else size // 8
        assert kept[form].numel() * kept[form].element_size() <= other + 1


# -- memories over a run of edits ------------------------------------------------------------------------------------


def plan(**changes: Any) -> Any:
    settings = {
        "mask_ratio": 0.3, "pool": 1.0, "seed": 0, "save_freq": 2, "merge_freq": 4, "retrieve": True, "densities": 0.5, "old_weight": 0.6,
        "act_ratio": 0.8, **changes,
    }  # fmt: skip
    return SimpleNamespace(**settings)


def walk(memories: Memories, acts: list[float]) -> list[Memories]:
    """Edits that add their number to every entry of the open mask, through an op after each (as a stack of patches would)."""
    out = []
    for n, act in enumerate(acts, memories.edits + 1):
        begin = memories.begin(torch.device("cpu"), torch.float64)
        memories = memories.after(dataclasses.replace(begin, values=begin.values + n), act)
        memories = Memories(memories.editor, memories.size).resumed(memories.op(Site(0, "mlp_down"), (10, 20), "silu"), memories.edits)
        out.append(memories)
    return out


def test_retrieve_keeps_memories_and_merges_the_last() -> None:
    p = plan()
    masks = [entries(200, 0.3, 1.0, 0, i) for i in range(5)]
    after = walk(Memories(p, 200), [5.0, 4.0, 7.0, 6.0, 9.0, 3.0, 2.0, 8.0, 1.0])
    assert [len(m.stored) for m in after] == [1, 1, 2, 1, 2, 2, 3, 2, 3]  # save after 2, 6; merge after 4, 8
    assert [m.min_activation for m in after[2].stored] == [4.0, 7.0]
    for i, m in ((0, masks[0]), (1, masks[0])):
        assert torch.equal(after[i].stored[0].where, m)
    assert after[1].stored[0].values.unique().tolist() == [3.0] and after[2].stored[1].values.unique().tolist() == [3.0]
    assert torch.equal(after[2].stored[1].where, masks[1]) and torch.equal(after[4].stored[1].where, masks[2])
    deltas = torch.zeros(2, 200, dtype=torch.float64)
    deltas[0, masks[0]], deltas[1, masks[1]] = 3.0, 7.0
    merged = after[3].stored[0]
    full = torch.zeros(200, dtype=torch.float64)
    full[merged.where] = merged.values
    torch.testing.assert_close(full, ties(deltas, [0.5, 0.5], 0.5))
    assert merged.min_activation == 4.0 and set(full.unique().tolist()) == {0.0, 3.0, 5.0, 7.0}
    assert torch.equal(after[7].stored[0].values, merged.values)  # the first merged memory stays as it is
    assert [m.min_activation for m in after[8].stored] == [4.0, 2.0, 1.0]


def test_merge_keeps_one_and_weighs_it() -> None:
    p = plan(retrieve=False)
    masks = [entries(200, 0.3, 1.0, 0, i) for i in range(4)]
    after = walk(Memories(p, 200), [5.0, 4.0, 7.0, 6.0, 9.0, 3.0, 2.0, 8.0])
    assert [len(m.stored) for m in after] == [1, 1, 2, 1, 2, 2, 3, 1]
    assert all(k.min_activation == min([5.0, 4.0, 7.0, 6.0, 9.0, 3.0, 2.0, 8.0][: i + 1]) for i, m in enumerate(after) for k in m.stored)
    old = torch.zeros(200, dtype=torch.float64)
    old[after[3].stored[0].where] = after[3].stored[0].values
    deltas = torch.zeros(3, 200, dtype=torch.float64)
    deltas[0, masks[2]], deltas[1, masks[3]], deltas[2] = 5.0 + 6.0, 7.0 + 8.0, old
    full = torch.zeros(200, dtype=torch.float64)
    full[after[7].stored[0].where] = after[7].stored[0].values
    torch.testing.assert_close(full, ties(deltas, [0.2, 0.2, 0.6], 0.5))


def test_a_stored_memory_is_read_back_whole() -> None:
    memories = Memories(plan(), 200)
    memory = Memory(entries(200, 0.3, 1.0, 0, 0), torch.arange(float(len(entries(200, 0.3, 1.0, 0, 0)))), 2.0)
    op = dataclasses.replace(memories, stored=(memory,) * 12, edits=24).op(SITE, (10, 20), "silu")
    assert all(torch.equal(unpack(packed(op.tensors, i)), memory.where) for i in range(12))  # "values.1" and "values.11" are not mixed up
    back = memories.resumed(op, 24)
    assert len(back.stored) == 12 and torch.equal(back.stored[11].values, memory.values)
