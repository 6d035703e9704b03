"""ConvSent's own score (Mitchell et al. 2022, SERAC, as in KnowEdit), a number a case from the likelihoods of its replies:

    ES = σ(ℓ_same,after − ℓ_opposite,after) · min(1, exp(ℓ_same,after − ℓ_same,before))

ℓ is the mean over the case's replies of a sentiment of the mean log-probability of a reply's tokens.  The first factor asks
whether wanted replies are likelier than opposite ones, the second takes back what the wanted ones themselves have lost.  Before
an edit the second factor is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from errata.request import SENTIMENT

KIND: Final = "sentiment"


def scores(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A record of kind "sentiment" for each method and case that has replies of both sides."""
    cases: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        if record["kind"] in SENTIMENT:
            cases.setdefault((record["method"], record["case"]), {}).setdefault(record["kind"], []).append(record)
    return [_score(*name, sides) for name, sides in cases.items() if len(sides) == len(SENTIMENT)]


def _score(method: str, case: str, sides: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, Any]:
    same, opposite = (
        {when: -sum(r[f"nll_{when}"] for r in sides[kind]) / len(sides[kind]) for when in ("before", "after")} for kind in SENTIMENT
    )
    out: dict[str, Any] = {"method": method, "case": case, "kind": KIND}
    for when in ("before", "after"):
        kept = min(1.0, math.exp(min(0.0, same[when] - same["before"])))
        out[f"sentiment_{when}"] = kept / (1 + math.exp(min(700.0, opposite[when] - same[when])))
    return out
