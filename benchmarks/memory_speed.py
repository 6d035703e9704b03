"""What a memory of N entries costs at use: a pass over the prompts and one decoded token, with it and without.

    python benchmarks/memory_speed.py [--entries 10000] [--method grace,melo,wise,retrieval] [--rows 1,16,192] [--repeat 5] [--threads 1]
                                      [--out FILE.json]
    python benchmarks/memory_speed.py --shape llama-2-7b --device cuda --dtype bfloat16

The memory's keys are those of benchmark prompts with noise of a twentieth of their size, half the rows hit an entry; values and blocks are
random: nothing is trained, only time is measured.  Milliseconds a token, the best of ``--repeat``, base and memory in turn.
A look-up happens once a text, at the prompt's last token; later tokens pay for what the memory does to them, which for a replaced
last token is nothing.  WISE keeps memories, not edits: a thousand edits are one memory there.  Retrieval embeds the prompt by a pass of
its own and reads what it found in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from edit_speed import begin, end, options, timed

from errata import registry
from errata.core.decode import fork
from errata.core.families import linear_sizes
from errata.core.model import LM
from errata.core.patch import Op, Patch, Site
from errata.core.read import read_activations
from errata.core.tokens import Encoded
from errata.methods.wise.op import LONG, pack
from errata.request import EditRequest


def keys_like(lm: LM, rows: list[Encoded], site: Site, count: int) -> torch.Tensor:
    """[count, I]: the rows' own keys, then noisy copies of them."""
    own = read_activations(lm, rows, [site])[site][0]
    noise = torch.randn(count, own.shape[1], generator=torch.Generator().manual_seed(0)).to(own)
    many = own.repeat(count // len(own) + 1, 1)[:count]
    noise[: len(own)] = 0
    return many + noise * (0.05 * torch.linalg.vector_norm(many, dim=1, keepdim=True) / own.shape[1] ** 0.5)


def grace(lm: LM, rows: list[Encoded], count: int) -> Patch:
    """A codebook of ``count`` entries where the method would put it; every prompt of an even row is in it."""
    editor = registry.get("method", "grace").for_model(lm)
    site = editor.target_site(lm)
    keys = keys_like(lm, rows[::2], site, count)
    _, outer = linear_sizes(lm.module(site))
    tensors = {"keys": keys, "values": torch.randn(count, outer).to(keys), "radii": keys.new_full((count,), 1e-3)}
    return Patch("grace", {}, lm.fingerprint, (), (Op("codebook", site, tensors, {"replace": editor.replace, "rounding": 1e-5}),))


def melo(lm: LM, rows: list[Encoded], count: int) -> Patch:
    """``count`` clusters of one point and a block each."""
    editor = registry.get("method", "melo").for_model(lm)
    site, sites = editor.target_sites(lm)
    keys, own = keys_like(lm, rows[::2], site, count), torch.arange(count, device=lm.device)
    router = {"centres": keys, "radii": keys.new_full((count,), 1e-3), "points": keys.clone(), "cluster": own, "block": own.clone()}
    ops = [Op("router", site, router, {"reads": "input", "rounding": 1e-5})]
    for place in sites:
        inner, outer = linear_sizes(lm.module(place))
        factors = {"down": torch.randn(count, editor.rank, inner) / inner, "up": torch.randn(count, outer, editor.rank) / outer}
        ops.append(Op("routed", place, {k: t.to(keys) for k, t in factors.items()}, {"scale": 1.0}))
    return Patch("melo", {}, lm.fingerprint, (), tuple(ops))


def wise(lm: LM, rows: list[Encoded], count: int) -> Patch:
    """The memories ``count`` edits leave with the published merging (one a thousand edits), each open to every prompt: the dearest case."""
    editor = registry.get("method", "wise").for_model(lm)
    site = editor.target_site(lm)
    inner, outer = linear_sizes(lm.module(site))
    many, generator = max(1, count // 1000), torch.Generator().manual_seed(0)
    tensors = {"least": torch.zeros(many)}
    for i in range(many):
        where = (torch.rand(inner * outer, generator=generator) < 0.2).nonzero()[:, 0]
        own = pack(where, torch.randn(len(where), generator=generator) / inner, inner * outer)
        tensors |= {f"{name}.{i}": t for name, t in own.items()}
    settings = {"shape": [outer, inner], "act": editor.act(lm), "act_ratio": editor.act_ratio, "long": LONG}
    return Patch("wise", {}, lm.fingerprint, (), (Op("side_memory", site, tensors, settings),))


def retrieval(lm: LM, rows: list[Encoded], count: int) -> Patch:
    """A store of ``count`` facts; every prompt of an even row has its own."""
    some = [lm.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows[::2]]
    requests = [EditRequest(prompt, "so") for prompt in dict.fromkeys(some)]
    patch = registry.get("method", "retrieval").for_model(lm, threshold=0.99).edit(lm, requests)
    op = patch.ops[0]
    own, again = op.tensors["keys"], count // len(op.tensors["keys"]) + 1
    noise = torch.randn((count, own.shape[1]), generator=torch.Generator().manual_seed(0)) * (0.3 / own.shape[1] ** 0.5)
    noise[: len(own)] = 0
    keys = torch.nn.functional.normalize(own.repeat(again, 1)[:count] + noise, dim=1)
    tensors = {"keys": keys, "owner": torch.arange(count)}
    tensors |= {name: op.tensors[name].repeat(again, *[1] * (op.tensors[name].ndim - 1))[:count] for name in ("texts", "lengths")}
    return Patch("retrieval", {}, lm.fingerprint, (), (replace(op, tensors=tensors),))


MEMORIES: dict[str, Callable[[LM, list[Encoded], int], Patch]] = {"grace": grace, "melo": melo, "wise": wise, "retrieval": retrieval}


@torch.no_grad()
def times(lm: LM, rows: list[Encoded], patch: Patch | None) -> tuple[float, float]:
    """(seconds of the pass over the prompts, of the next token's)."""
    batch = lm.batch(rows).to(lm.device)
    plan = lm.plan([(patch,) if patch else ()], None, len(rows))
    plan.prompt_lengths = batch.prompt_lengths
    mask = torch.cat([batch.mask, batch.mask.new_ones((len(rows), 1))], 1)
    with lm.running(plan):
        prompt, out = timed(lambda: lm.forward(batch.ids, batch.mask, use_cache=True, **lm.last_logits_kwargs), lm.device)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        later = min(timed(lambda: lm.forward(token, mask, past_key_values=fork(out.past_key_values)), lm.device)[0] for _ in range(3))
    return prompt, later


def compare(lm: LM, rows: list[Encoded], patch: Patch, repeat: int) -> dict[str, Any]:
    tokens = sum(len(r.ids) for r in rows)
    seen: dict[str, list[tuple[float, float]]] = {"base": [], "memory": []}
    for _ in range(repeat + 1):  # the first warms up
        for name, on in (("base", None), ("memory", patch)):
            seen[name].append(times(lm, rows, on))
    prompt, later = ({name: min(t[i] for t in all_[1:]) for name, all_ in seen.items()} for i in (0, 1))
    return {
        "rows": len(rows),
        "prompt_tokens": tokens,
        "prompt_ms_a_token": {k: round(1e3 * t / tokens, 4) for k, t in prompt.items()},
        "prompt_overhead": round(prompt["memory"] / prompt["base"] - 1, 3),
        "look_up_ms_a_text": round(1e3 * (prompt["memory"] - prompt["base"]) / len(rows), 4),
        "later_ms_a_token": {k: round(1e3 * t / len(rows), 4) for k, t in later.items()},
        "later_overhead": round(later["memory"] / later["base"] - 1, 3),
    }


def main() -> None:
    parser = options(__doc__, "entries", 10_000, 0)
    parser.add_argument("--method", default=",".join(MEMORIES), help="with commas")
    parser.add_argument("--rows", default="1,16,192", help="texts in a batch, with commas")
    args = parser.parse_args()
    lm, requests, result = begin(args, 48)
    result["memories"] = []
    for name in args.method.split(","):
        for count in (int(n) for n in args.rows.split(",")):
            rows = (lm.encode([r.prompt for r in requests]) * (count // len(requests) + 1))[:count]
            patch = MEMORIES[name](lm, rows, args.entries)
            result["memories"].append({"method": name, "bytes": 4 * patch.parameters, **compare(lm, rows, patch, args.repeat)})
            print(result["memories"][-1], flush=True)
    end(result, args.out)


if __name__ == "__main__":
    main()
