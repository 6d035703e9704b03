"""What was last written of a fact, where a stream of edits contradicts itself (see `errata.benchmarks.streams`).

Once a later edit has written another answer to the same fact, "as this record wants" and "as was last written" are two questions.
Records of a mark of such a stream carry both, from the same free answer:

    last_target                            the answer that was written last of this fact
    is_last                                it is the record's own
    starts_last_before, starts_last_after  the free answer begins with it; likewise ``gen_match_last_…`` and ``contains_last_…``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from errata.benchmarks.streams import fact_of, last_targets, overwritten
from errata.request import Case
from errata.score import match

Records = list[dict[str, Any]]
KINDS: Final = ("rewrite", "rephrase")
_JUDGES: Final = (("gen_match", match.exact_match), ("starts", match.starts), ("contains", match.contains))


def add_last_written(records: Records, cases: Sequence[Case]) -> Records:
    """The records with those fields, where some fact of ``cases`` (all edited so far, in order) was written twice; else as they are."""
    if not overwritten(cases):
        return records
    last = last_targets(cases)
    wanted = {(case.id, r.target): last[fact_of(r)] for case in cases for r in case.requests}
    return [{**r, **_fields(r, wanted[r["case"], r["target"]])} if _asks(r, wanted) else r for r in records]


def _asks(record: Mapping[str, Any], wanted: Mapping[tuple[str, str], str]) -> bool:
    return record["kind"] in KINDS and (record["case"], record["target"]) in wanted


def _fields(record: Mapping[str, Any], target: str) -> dict[str, Any]:
    if target == record["target"]:  # with the spellings that count as it
        said = {f"{name}_last_{when}": record[f"{name}_{when}"] for name, _ in _JUDGES for when in ("before", "after")}
    else:
        said = {f"{name}_last_{when}": same(record[f"gen_{when}"], target) for name, same in _JUDGES for when in ("before", "after")}
    return {"last_target": target, "is_last": target == record["target"], **said}
