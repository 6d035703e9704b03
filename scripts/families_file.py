"""Read, check and write ``src/errata/core/families.json``: the paths of each family's parts, and what was verified on it.

In the file a verification that names every method says ``"all"``, and ``all_methods`` says which those were when it was written: a method
that is registered later is claimed for no family until `verify_families.py` has run again.  In memory the names are always spelled out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata import registry
from errata.core.families import FILE

PARTS = ("blocks", "mlp_down", "attn_out", "embedding", "final_norm")
TINY = "tiny, trained in the tests"
REAL = ("almanac", "SmolLM2-135M-Instruct")
DTYPES = ("float32", "bfloat16")
FIELDS = {
    "weights": str,
    "dtypes": list,
    "forward": bool,
    "undo": bool,
    "methods": list,
    "failed": dict,
    "torch": str,
    "transformers": str,
    "date": str,
}
Data = dict[str, Any]


def read(path: Path = FILE) -> Data:
    """The file with ``"all"`` spelled out."""
    data: Data = json.loads(path.read_text(encoding="utf-8"))
    for row in data["families"].values():
        for claim in row["verified"]:
            if claim.get("methods") == "all":
                claim["methods"] = list(data["all_methods"])
    return data


def put(data: Data, family: str, claim: Data) -> None:
    """A verification in the place of an older one on the same weights."""
    row = data["families"].setdefault(family, {"paths": None, "verified": []})
    order = (TINY, *REAL)
    others = [old for old in row["verified"] if old["weights"] != claim["weights"]]
    row["verified"] = sorted([*others, claim], key=lambda c: order.index(c["weights"]))


def write(data: Data, path: Path = FILE) -> None:
    """One line a verification, so that a change of one is a change of one line."""
    every = registry.names("method")
    families = []
    for name, row in data["families"].items():
        claims = [{**c, "methods": "all" if c["methods"] == every else c["methods"]} for c in row["verified"]]
        lines = ",\n".join(f"        {json.dumps(c, ensure_ascii=False)}" for c in claims)
        verified = f"[\n{lines}\n      ]" if claims else "[]"
        families.append(f'    {json.dumps(name)}: {{\n      "paths": {json.dumps(row["paths"])},\n      "verified": {verified}\n    }}')
    text = f'{{\n  "all_methods": {json.dumps(every)},\n  "families": {{\n' + ",\n".join(families) + "\n  }\n}\n"
    path.write_text(text, encoding="utf-8")


def faults(data: Data) -> list[str]:
    """What is wrong with the data of `read`: a key that is not known, one that is missing, a name nobody has, a claim that contradicts itself."""
    out = [f"{key!r} is not one of all_methods, families" for key in data if key not in ("all_methods", "families")]
    if data.get("all_methods") != registry.names("method"):
        out.append("all_methods are not the methods that are registered; run scripts/verify_families.py")
    for name, row in data.get("families", {}).items():
        if set(row) != {"paths", "verified"}:
            out.append(f"{name}: has {sorted(row)}, not paths and verified")
            continue
        out += [f"{name}: {fault}" for fault in _paths(row["paths"])]
        out += [f"{name}: {fault}" for claim in row["verified"] for fault in _claim(claim)]
        weights = [claim.get("weights") for claim in row["verified"]]
        if len(set(weights)) != len(weights):
            out.append(f"{name}: two verifications on the same weights")
    return out


def _paths(paths: Any) -> Iterator[str]:
    if paths is None:
        return
    if tuple(paths) != PARTS:
        yield f"paths are {list(paths)}, not {list(PARTS)}"
    for part, path in paths.items():
        if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)*", path):
            yield f"{part} is {path!r}, not a dotted path"


def _claim(claim: Data) -> Iterator[str]:
    if tuple(claim) != tuple(FIELDS):
        yield f"a verification has {list(claim)}, not {list(FIELDS)}"
        return
    yield from (f"{key} is {claim[key]!r}, not a {kind.__name__}" for key, kind in FIELDS.items() if not isinstance(claim[key], kind))
    if claim["weights"] not in (TINY, *REAL):
        yield f"nobody knows the weights {claim['weights']!r}"
    if not claim["dtypes"] or not set(claim["dtypes"]) <= set(DTYPES):
        yield f"dtypes {claim['dtypes']}"
    methods, failed, known = set(claim["methods"]), set(claim["failed"]) - {"forward"}, set(registry.names("method"))
    if strange := (methods | failed) - known:
        yield f"no method is called {sorted(strange)[0]!r}"
    if both := methods & failed:
        yield f"{sorted(both)[0]} is said to work and to fail"
    if claim["forward"] == ("forward" in claim["failed"]):
        yield "whether the forward holds, and what failed, contradict each other"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", str(claim["date"])):
        yield f"{claim['date']!r} is no date"
