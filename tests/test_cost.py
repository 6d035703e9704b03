"""What a patch costs: bytes are those of the folder, and timing leaves the model as it was."""

from __future__ import annotations

from families import lm
from tiny import EDITS, FRANCE

from errata.methods.subspace.reft import ReFT
from errata.request import EditRequest
from errata.score.cost import latency, size_on_disk


def test_bytes_are_those_of_the_saved_folder_and_grow_with_the_patch(tmp_path) -> None:  # type: ignore[no-untyped-def]
    base, request = lm("llama"), EditRequest(*EDITS[0])
    small, large = (ReFT(rank=rank, steps=1, layers=(3,)).edit(base, [request]) for rank in (1, 8))
    saved = small.save(tmp_path / "p")
    assert size_on_disk(small) == sum(f.stat().st_size for f in saved.iterdir())
    assert size_on_disk(large) - size_on_disk(small) >= 4 * (large.parameters - small.parameters) - 200


def test_latency_times_each_stack_and_leaves_what_is_attached() -> None:
    base = lm("llama")
    a, b = (ReFT(rank=1, steps=1, layers=(3,), seed=s).edit(base, [EditRequest(*EDITS[0])]) for s in (0, 1))
    base.attach(a)
    found = latency(base, [(), (b,)], [FRANCE, FRANCE, FRANCE], tokens=2, repeat=1, rows=2)
    assert len(found) == 2 and all(seconds > 0 and ratio > 0 for seconds, ratio in found)
    assert [p.id for p in base.stack] == [a.id]
