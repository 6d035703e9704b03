"""Names to code, lazily: adding a method, benchmark or op is one line here and one file there."""

from __future__ import annotations

import importlib
from typing import Any

from errata.errors import ConfigError, UnknownNameError, near

# kind -> name -> "module:attribute".  Nothing is imported before it is asked for.
ENTRIES: dict[str, dict[str, str]] = {
    "method": {
        "baft": "errata.methods.subspace.baft:BaFT",
        "reft": "errata.methods.subspace.reft:ReFT",
        "rome": "errata.methods.locate.rome:ROME",
        "r-rome": "errata.methods.locate.rome:RROME",
        "memit": "errata.methods.locate.memit:MEMIT",
        "pmet": "errata.methods.locate.memit:PMET",
        "emmet": "errata.methods.locate.emmet:EMMET",
        "alphaedit": "errata.methods.locate.alphaedit:AlphaEdit",
        "ft-l": "errata.methods.finetune.ft:FTL",
        "ft-m": "errata.methods.finetune.ft:FTM",
        "loc-ft": "errata.methods.finetune.ft:LocFT",
        "lora": "errata.methods.adapters.lora:LoRA",
        "adalora": "errata.methods.adapters.adalora:AdaLoRA",
        "grace": "errata.methods.codebook.grace:GRACE",
        "melo": "errata.methods.codebook.melo:MELO",
        "ike": "errata.methods.in_context.ike:IKE",
        "ice": "errata.methods.in_context.ice:ICE",
        "retrieval": "errata.methods.in_context.retrieval:Retrieval",
        "none": "errata.methods.none:Unedited",
        "wise": "errata.methods.wise.wise:WISE",
        "wise-light": "errata.methods.wise.wise:WISELight",
        "rep": "errata.methods.rep.rep:REP",
    },
    "benchmark": {
        "almanac": "errata.benchmarks.almanac:Almanac",
        "everyday": "errata.benchmarks.everyday:Everyday",
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
        "robustkey": "errata.benchmarks.robustkey:RobustKey",
        "piqa": "errata.benchmarks.downstream:PIQA",
        "nq-open": "errata.benchmarks.downstream:NQOpen",
        "known1000": "errata.benchmarks.downstream:Known1000",
    },
    "op": {
        "context": "errata.core.context:ContextOp",
        "low_rank": "errata.core.weights:LowRank",
        "dense": "errata.core.weights:Dense",
        "experts": "errata.core.experts:Experts",
        "subspace": "errata.methods.subspace.op:Subspace",
        "shift": "errata.methods.locate.op:Shift",
        "adapter": "errata.methods.adapters.op:Adapter",
        "codebook": "errata.methods.codebook.op:Codebook",
        "router": "errata.methods.codebook.op:Router",
        "routed": "errata.methods.codebook.op:Routed",
        "side_memory": "errata.methods.wise.op:SideMemory",
        "moved": "errata.methods.wise.op:OutputShift",
        "key_adaptor": "errata.methods.rep.op:KeyAdaptor",
    },
}


def names(kind: str) -> list[str]:
    """What is registered under a kind, sorted."""
    return sorted(ENTRIES[kind])


def get(kind: str, name: str) -> Any:
    """The class behind a name; `UnknownNameError` with the nearest names otherwise."""
    try:
        target = ENTRIES[kind][name]
    except KeyError:
        raise UnknownNameError(f"no {kind} named {name!r}; {near(str(name).lower(), names(kind), 'there are')}") from None
    return load(target)


def own(what: str, name: str) -> Any:
    """What someone's own "module:attribute" names; `ConfigError` where it cannot be had, whatever its module raises."""
    try:
        return load(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {name!r} cannot be imported: {error or type(error).__name__}; put its folder on PYTHONPATH") from None


def load(target: str) -> Any:
    """What stands behind "module:attribute", imported now."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
