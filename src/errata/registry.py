"""Names to code, lazily: adding a method, benchmark, family or op is one line here and one file there."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from errata.errors import UnknownName

# kind -> name -> "module:attribute".  Nothing is imported before it is asked for.
ENTRIES: dict[str, dict[str, str]] = {
    "method": {
        "baft": "errata.methods.baft:BaFT",
        "reft": "errata.methods.reft:ReFT",
        "rome": "errata.methods.rome:ROME",
        "r-rome": "errata.methods.rome:RROME",
        "memit": "errata.methods.memit:MEMIT",
        "pmet": "errata.methods.memit:PMET",
        "emmet": "errata.methods.emmet:EMMET",
        "alphaedit": "errata.methods.alphaedit:AlphaEdit",
        "ft-l": "errata.methods.ft:FTL",
        "ft-m": "errata.methods.ft:FTM",
        "loc-ft": "errata.methods.ft:LocFT",
        "lora": "errata.methods.lora:LoRA",
        "adalora": "errata.methods.adalora:AdaLoRA",
        "grace": "errata.methods.grace:GRACE",
        "melo": "errata.methods.melo:MELO",
        "ike": "errata.methods.in_context:IKE",
        "ice": "errata.methods.in_context:ICE",
        "retrieval": "errata.methods.retrieval:Retrieval",
        "none": "errata.methods.none:Nothing",
        "wise": "errata.methods.wise:WISE",
        "wise-light": "errata.methods.wise:WISELight",
    },
    "benchmark": {
        "almanac": "errata.benchmarks.almanac:Almanac",
        "zsre": "errata.benchmarks.zsre:ZsRE",
        "wiki-recent": "errata.benchmarks.knowedit:WikiRecent",
        "wiki-counterfact": "errata.benchmarks.knowedit:WikiCounterfact",
        "wikibio": "errata.benchmarks.knowedit:WikiBio",
        "convsent": "errata.benchmarks.convsent:ConvSent",
        "counterfact": "errata.benchmarks.counterfact:CounterFact",
        "mquake": "errata.benchmarks.mquake:MQuAKE",
        "wise-hallucination": "errata.benchmarks.wise:WISEHallucination",
        "wise-temporal": "errata.benchmarks.wise:WISETemporal",
        "qaedit": "errata.benchmarks.qaedit:QAEdit",
        "unke": "errata.benchmarks.unke:UnKE",
        "peak": "errata.benchmarks.peak:PEAK",
        "piqa": "errata.benchmarks.downstream:PIQA",
        "nq-open": "errata.benchmarks.downstream:NQOpen",
        "known1000": "errata.benchmarks.downstream:Known1000",
    },
    "op": {
        "context": "errata.context:InFront",
        "low_rank": "errata.weights:LowRank",
        "dense": "errata.weights:Dense",
        "subspace": "errata.methods.subspace:Subspace",
        "shift": "errata.methods.values:Shift",
        "adapter": "errata.methods.adapter:Adapter",
        "codebook": "errata.methods.grace:Codebook",
        "router": "errata.methods.melo_ops:Router",
        "routed": "errata.methods.melo_ops:Routed",
        "side_memory": "errata.methods.side_memory:SideMemory",
        "moved": "errata.methods.side_memory:Moved",
    },
}


def names(kind: str) -> list[str]:
    """What is registered under a kind, sorted."""
    return sorted(ENTRIES[kind])


def get(kind: str, name: str) -> Any:
    """The class behind a name; `UnknownName` with the nearest names otherwise."""
    try:
        target = ENTRIES[kind][name]
    except KeyError:
        near = difflib.get_close_matches(str(name).lower(), ENTRIES[kind], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names(kind))}"
        raise UnknownName(f"no {kind} named {name!r}; {hint}") from None
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
