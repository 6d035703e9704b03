"""``errata ledger``: edits that live: applied, listed, explained, taken back, checked, compacted, exported."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata import registry
from errata.commands import common, edit, files, neighbours
from errata.commands.export import tell_llama_cpp, tell_vllm
from errata.commands.screen import Screen, said
from errata.core.chat import user_words
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.ledger import Ledger
    from errata.ledger.database import Edit, Event


def add(commands: common.Subparsers) -> None:
    about = "keep edits in a durable ledger: apply, undo, log, show, blame, diff, check, compact, export"
    group = commands.add_parser("ledger", help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False)
    verbs = group.add_subparsers(metavar="VERB", required=True, dest="verb")
    out = _parser(verbs, "apply", apply, "make edits and write them down, or take saved patches")
    edit.request_options(out)
    common.mode_options(out)
    out.add_argument("--patch", nargs="+", action="extend", metavar="DIR", help="take these saved patches instead of making edits")
    out.add_argument("--force", action="store_true", help="go on although a fact is there already, contradicted or known")
    _why(out)
    out = _parser(verbs, "undo", undo, "take an edit back, whichever and in any order")
    out.add_argument("edit", type=common.positive, metavar="EDIT", help="its number (`errata ledger log`)")
    out.add_argument("--remake", action="store_true", help="make the later edits again, as if this one had never been")
    _why(out)
    out = _parser(verbs, "log", log, "list what was done, and what is live", model=False)
    out.add_argument("--last", type=common.positive, metavar="N", help="the last N lines only")
    out = _parser(verbs, "show", show, "show one edit", model=False)
    out.add_argument("edit", type=common.positive, metavar="EDIT", help="its number (`errata ledger log`)")
    out = _parser(verbs, "blame", blame, "say which live edits change an answer, by switching them off")
    out.add_argument("prompt", metavar="PROMPT", help="text to go on from")
    _tokens(out)
    out = _parser(verbs, "diff", diff, "compare answers in two states")
    out.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to go on from")
    out.add_argument("--from", dest="before", default="base", metavar="STATE", help="base, live, or the number of an event (base)")
    out.add_argument("--to", dest="after", default="live", metavar="STATE", help="likewise (live)")
    _tokens(out)
    out = _parser(verbs, "check", check, "ask every live edit again; name those that later edits broke")
    out.add_argument("--repair", action="store_true", help="make patches whose folders are damaged again, from the record")
    neighbours.options(out)
    out = _parser(verbs, "compact", compact, "merge patches that change weights, drop folders nobody needs; the history stays", model=False)
    out.add_argument("--no-merge", action="store_true", help="only drop folders")
    out.add_argument("--lean", action="store_true", help="keep only the patches that run; undoing one of the others needs --remake then")
    _why(out)
    out = _parser(verbs, "export", export, "write the live edits as patches and requests, and as a LoRA adapter where they are one")
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    out.add_argument("--rank", type=common.positive, metavar="N", help="of the adapter at most, at a loss; without it exact")
    out.add_argument("--every-block", action="store_true", help="zeros in the adapter for the other blocks (TGI wants all)")
    out.add_argument("--checkpoint", action="store_true", help="also the whole model with the edits in its weights")
    out.add_argument("--gguf", action="store_true", help="also the adapter as llama.cpp reads it")


def _parser(verbs: common.Subparsers, name: str, run: Any, about: str, model: bool = True) -> argparse.ArgumentParser:
    out = common.parser(verbs, name, run, about, model=False)
    out.add_argument("ledger", type=Path, metavar="LEDGER", help="its folder; `apply` makes a new one")
    if model:
        out.add_argument("--model", metavar="MODEL", help="what the edits are for; without it the model that the ledger was begun with")
        common.model_options(out)
    out.add_argument("--wait", type=float, default=30.0, metavar="SECONDS", help="for another writer (30)")
    return out


def _why(out: argparse.ArgumentParser) -> None:
    out.add_argument("--author", metavar="NAME", help="who does it (the login name)")
    out.add_argument("--reason", default="", metavar="TEXT", help="why, for the log")


def _tokens(out: argparse.ArgumentParser) -> None:
    out.add_argument("--max-new-tokens", type=common.positive, default=edit.TOKENS, metavar="N", help=f"of an answer ({edit.TOKENS})")
    common.chat_option(out, "ask")


def _open(args: argparse.Namespace, model: bool = True) -> Ledger:
    """The ledger, with the model that was named or that it was begun with."""
    from errata.ledger import Ledger
    from errata.ledger.database import LedgerDatabase
    from errata.ledger.state import as_text

    for name in ("author", "reason"):
        as_text(name, getattr(args, name, None) or "")
    if not 0 <= args.wait <= 86_400:
        raise ConfigError(f"--wait must be from 0 to 86400 seconds, not {args.wait:g}")
    lm = None
    if model:
        record = LedgerDatabase(args.ledger, args.wait)
        if args.model is None and record.exists():
            with record.read_transaction() as view:
                args.model = view.meta("model")
        lm = None if args.model is None else common.load(args)
        if lm is not None and Path(lm.name).is_dir():
            lm.name = str(Path(lm.name).resolve())  # the ledger remembers it, wherever it is called from
    return Ledger.open(args.ledger, lm, author=getattr(args, "author", None), wait=args.wait)


def apply(args: argparse.Namespace, screen: Screen) -> None:
    if args.patch and any(getattr(args, n) for n in (*edit.OF_ONE, "requests", "config", "set", "chat")):
        raise ConfigError("--patch takes patches as they are; leave the options that make an edit out")
    patches = files.load_patches(args.patch) if args.patch else ()
    wanted, settings = ([], {}) if patches else (edit.requests(args), edit.settings(args))
    size = common.batch_size(args)
    if not patches:
        registry.get("method", args.method).judge(settings)
    ledger = _open(args)
    wanted = common.edited(ledger.lm, wanted, args.chat)
    made: list[Edit] = []
    if patches:
        made = ledger.apply_patches(patches, reason=args.reason, force=args.force)
        _acknowledge(screen, made)
    else:
        how = {"method": args.method, "settings": settings, "mode": args.mode, "size": size, "reason": args.reason, "force": args.force}
        with screen.progress() as progress:
            for part in ledger.iter_apply(wanted, **how, progress=progress):
                made += part
                _acknowledge(screen, part)
    screen.document({"ledger": str(args.ledger), "base": ledger.lm.fingerprint, "edits": [e.to_dict() for e in made]})


def _acknowledge(screen: Screen, made: list[Edit]) -> None:
    """A line an edit, at once: what was said is on the disk."""
    for each in made:
        screen.say(f"edit {each.number} is live: {_facts(each)}  (patch {each.patch})")
    screen.flush()


def _facts(each: Edit) -> str:
    first = each.requests[0]
    more = f" and {len(each.requests) - 1} more" if len(each.requests) > 1 else ""
    return f"{first.prompt!r} -> {first.target!r}{more}"


def undo(args: argparse.Namespace, screen: Screen) -> None:
    ledger = _open(args, model=args.remake)
    with screen.progress() as progress:
        done = ledger.undo(args.edit, remake=args.remake, reason=args.reason, progress=progress)
    screen.document(dataclasses.asdict(done))
    screen.say(f"edit {done.edit} is undone: {_facts(ledger.show(done.edit))}")
    if done.remade:
        screen.say(f"Made again without it: {', '.join(str(n) for n, _, _ in done.remade)}.")
    if done.on_top:
        screen.say(f"Made while it was on, and left as they are: {', '.join(map(str, done.on_top))} (--remake makes them again).")


def _line(event: Event) -> str:
    """What an event did, in words."""
    d = event.details
    if event.verb == "apply":
        return f"edit{'' if len(d['edits']) == 1 else 's'} {', '.join(map(str, d['edits']))}"
    if event.verb == "undo":
        again = f", made again: {', '.join(str(r['edit']) for r in d['remade'])}" if d["remade"] else ""
        return f"edit {d['edit']}{again}"
    if event.verb == "compact":
        return f"{len(d['merges'])} merged, {len(d['dropped'])} folders dropped"
    return ", ".join(f"{k} {v}" for k, v in d.items())


def log(args: argparse.Namespace, screen: Screen) -> None:
    ledger = _open(args, model=False)
    events, edits = ledger.log(args.last), ledger.edits(live=False)
    head = {"ledger": str(args.ledger), "model": ledger.meta("model"), "base": ledger.meta("base")}
    screen.document({**head, "events": [dataclasses.asdict(e) for e in events], "edits": [e.to_dict() for e in edits]})
    screen.table(
        ("event", "time (UTC)", "author", "done", "what", "reason"),
        [(e.id, e.time[:19].replace("T", " "), e.author, e.verb, _line(e), e.reason) for e in events],
    )
    screen.say()
    screen.table(
        ("edit", "live", "method", "fact"),
        [(e.number, "yes" if e.undone is None else "no", e.method, _facts(e)) for e in edits if args.last is None or e.undone is None],
    )


def show(args: argparse.Namespace, screen: Screen) -> None:
    ledger = _open(args, model=False)
    found = ledger.show(args.edit)
    screen.document({**found.to_dict(), "folder": str(ledger.patch_store.folder / found.patch)})
    state = "live" if found.undone is None else f"undone {found.undone.time} by {found.undone.author} {found.undone.reason}".rstrip()
    how = "brought in as a saved patch" if found.settings is None else "made alone" if found.alone else "made on the edits before it"
    screen.say(f"edit {found.number}  {state}\n{found.method}, {how}; applied {found.applied.time} by {found.applied.author}")
    screen.say(f"reason: {found.applied.reason or '(none given)'}\npatch {found.patch} in {ledger.patch_store.folder}")
    screen.table(("prompt", "target", "subject"), [(r.prompt, r.target, r.subject or "") for r in found.requests])
    screen.table(("setting", "value"), list((found.settings or {}).items()))


def blame(args: argparse.Namespace, screen: Screen) -> None:
    ledger = _open(args)
    found = ledger.blame(common.asked(ledger.lm, [args.prompt], args.chat)[0], tokens=args.max_new_tokens)
    screen.document(dataclasses.asdict(found))
    screen.say(f"base: {said(found.base)}\nlive: {said(found.live)}\n")
    screen.table(
        ("edits", "answer without", "alone on the base", "needed", "suffices", "shift (nats)"),
        [
            ("+".join(map(str, p.edits)), said(p.off), said(p.alone), _yes(p.needed), _yes(p.suffices), f"{p.shift:+.3f}")
            for p in found.parts
        ],
        right=(5,),
    )
    screen.say(found.verdict)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def diff(args: argparse.Namespace, screen: Screen) -> None:
    ledger = _open(args)
    found = ledger.diff(common.asked(ledger.lm, args.prompts, args.chat), args.before, args.after, tokens=args.max_new_tokens)
    rows = [{**dataclasses.asdict(d), "changed": d.changed} for d in found]
    screen.document({"from": args.before, "to": args.after, "answers": rows})
    screen.table(
        ("prompt", args.before, args.after, "changed", "probability moved"),
        [(p, said(d.before), said(d.after), _yes(d.changed), f"{d.moved:.3f}") for p, d in zip(args.prompts, found, strict=True)],
        right=(4,),
    )


def check(args: argparse.Namespace, screen: Screen) -> None:
    with screen.progress() as progress:
        ledger = _open(args)
        found = ledger.check(repair=args.repair, progress=progress)
        requests = [h.request for h in found.held if h.status not in ("damaged", "unknown")]
        stack, names = ledger.stack() if requests else (), neighbours.names(args)
        kept = neighbours.watched(ledger.lm, requests, [stack] * len(requests), args, names, progress, otherwise=True)
    about = [{"request": r.to_dict(), **one} for r, one in zip(requests, kept, strict=True) if one is not None]
    screen.document({**found.to_dict(), "neighbours": about})
    for number, exact in found.repaired:
        screen.say(f"edit {number} was made again, {'bit for bit' if exact else 'not bit for bit: it is a new patch'}.")
    screen.table(
        ("edit", "prompt", "wanted", "answer", "status"),
        [
            (
                h.edit,
                user_words(ledger.lm.tokenizer, h.request.prompt),
                h.request.target,
                said(h.answer),
                h.status if h.by is None else f"{h.status} by edit {h.by}",
            )
            for h in found.held
        ],
    )
    screen.say(f"{sum(h.status == 'right' for h in found.held)} of {len(found.held)} hold.")
    neighbours.show(screen, kept)


def compact(args: argparse.Namespace, screen: Screen) -> None:
    found = _open(args, model=False).compact(merge=not args.no_merge, lean=args.lean, reason=args.reason)
    screen.document(dataclasses.asdict(found))
    for patch, edits in found.merges:
        screen.say(f"edits {', '.join(map(str, edits))} run as one patch, {patch}.")
    screen.say(f"{len(found.dropped)} folder{'' if len(found.dropped) == 1 else 's'} dropped, {found.freed:,} bytes.")


def export(args: argparse.Namespace, screen: Screen) -> None:
    ledger = _open(args)
    found = ledger.export(args.out, rank=args.rank, every_block=args.every_block, checkpoint=args.checkpoint, gguf=args.gguf)
    adapter, checkpoint, gguf = (None if p is None else str(p) for p in (found.adapter, found.checkpoint, found.gguf))
    document = {"saved": str(args.out), "patches": list(found.patches), "requests": found.requests, "adapter": adapter}
    document |= {"why_not": found.why_not, "rank": found.rank, "vllm_objections": list(found.objections)}
    screen.document({**document, "checkpoint": checkpoint, "gguf": gguf})
    screen.say(f"Patches: {len(found.patches)}, requests: {found.requests}. " + common.saved(args.out))
    screen.say(f"LoRA adapter: {adapter}" if adapter else f"No LoRA adapter: {found.why_not}")
    if adapter:
        tell_vllm(screen, ledger.lm.name, adapter, found.rank, found.objections)
    if checkpoint:
        screen.say(f"Checkpoint: {checkpoint}; vllm serve {checkpoint}")
    if gguf:
        tell_llama_cpp(screen, gguf)
