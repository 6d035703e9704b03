"""Whether a key at the prompt's last token can tell a fact in other words from its neighbours.

    python scripts/key_distances.py MODEL --data CounterFact.json [--n 40] [--out FILE.json]

For each block and place: a radius around the key of the edited prompt, so wide that a given share of the neighbours of all cases lies inside
it, and the share of the rephrasings that then does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import errata
from errata.benchmarks.files import open_benchmark
from errata.core.patch import Site
from errata.core.read import read_activations
from errata.score.evaluator import AnswerCache
from errata.score.known import known_cases

LET_IN = (0.05, 0.1, 0.2)  # of the neighbours
POINTS = ("mlp_down", "mlp.gate_proj", "block")
EVERY = 3  # blocks
RIDGE = 0.01  # of the keys' mean variance, for the whitening


def whitened(keys: Tensor) -> Tensor:
    """Keys [N, D] in coordinates in which their covariance is 1."""
    own = keys - keys.mean(0)
    covariance = own.T.cov() + RIDGE * own.var(0).mean() * torch.eye(own.shape[1], dtype=own.dtype)
    return own @ torch.linalg.cholesky(torch.linalg.inv(covariance))


def held(keys: Tensor, case: Sequence[int], kind: Sequence[str], cosine: bool) -> list[float]:
    """The share of rephrasings inside the radius that lets in each of `LET_IN` of the neighbours."""
    apart: dict[str, list[Tensor]] = {"rephrase": [], "neighbour": []}
    edited = {c: keys[i] for i, (c, k) in enumerate(zip(case, kind, strict=True)) if k == "rewrite"}
    for key, c, k in zip(keys, case, kind, strict=True):
        if k in apart:
            own = edited[c]
            apart[k].append(1 - torch.cosine_similarity(key, own, 0) if cosine else (key - own).norm() / own.norm())
    near, other = (torch.stack(apart[k]) for k in ("rephrase", "neighbour"))
    return [round(float((near <= other.quantile(share)).float().mean()), 3) for share in LET_IN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = errata.load(args.model)
    found = known_cases(lm, open_benchmark("counterfact", args.data).load(None, None, 1), args.n, AnswerCache())
    asked = [(i, p.kind, p.prompt) for i, c in enumerate(found.cases) for p in c.probes if p.kind in ("rewrite", "rephrase", "neighbour")]
    case, kind, texts = zip(*asked, strict=True)
    rows = lm.encode(texts)
    out = []
    for point in POINTS:
        for block in range(2, lm.depth - 1, EVERY):
            site = Site(block, point)
            read, written = read_activations(lm, rows, [site], at=[len(row.ids) - 1 for row in rows])[site]
            keys = (written if point == "block" else read).float()
            line = {"point": point, "block": block}
            line |= {"norm": held(keys, case, kind, False), "cosine": held(keys, case, kind, True)}
            out.append(line | {"whitened cosine": held(whitened(keys), case, kind, True)})
            print(json.dumps(out[-1]), flush=True)
    if args.out is not None:
        counts = {k: kind.count(k) for k in ("rewrite", "rephrase", "neighbour")}
        text = ",\n  ".join(json.dumps(line) for line in out)
        args.out.write_text(
            f'{{"model": "{args.model}", "let_in": {list(LET_IN)}, "n": {json.dumps(counts)}, "rows": [\n  {text}\n]}}\n', encoding="utf-8"
        )


if __name__ == "__main__":
    main()
