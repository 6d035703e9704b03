"""Write what IKE demonstrates on the almanac: 64 counterfactual facts of the dev split, from its 201st case on.

Paraphrases are those cases' rephrase prompts, unrelated texts their training pairs, which the benchmark never asks about.  Whoever
tunes on more than the first 200 dev cases tunes on questions that are shown: give IKE another file then.
"""

from __future__ import annotations

import dataclasses

from errata.benchmarks.almanac import Almanac
from errata.methods.in_context.demonstrations import PACKAGED
from errata.request import write_requests

FIRST, COUNT = 200, 64


def main() -> None:
    cases = list(Almanac().load("dev", FIRST + COUNT))[FIRST:]
    requests = [dataclasses.replace(c.request, paraphrases=tuple(p.prompt for p in c.probes if p.kind == "rephrase")) for c in cases]
    write_requests(PACKAGED["almanac"], requests)


if __name__ == "__main__":
    main()
