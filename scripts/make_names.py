"""CounterFact's subjects by relation, as `errata.contrast.names` reads them:  python scripts/make_names.py DATA_FOLDER

The flattened files name no relation; it is that of most original records with the same prompt.
"""

from __future__ import annotations

import collections
import json
import lzma
import sys
from pathlib import Path

OUT = Path(__file__).parent.parent / "src" / "errata" / "contrast" / "counterfact.txt.xz"
KINDS = {
    "P17": "places by country", "P19": "people by birthplace", "P20": "people by place of death", "P27": "people by citizenship",
    "P30": "places by continent", "P36": "places with a capital", "P37": "places by language", "P39": "people by office",
    "P101": "people by field", "P103": "people by mother tongue", "P106": "people by profession", "P108": "people by employer",
    "P127": "things by owner", "P131": "places by region", "P136": "musicians by genre", "P138": "things named after others",
    "P140": "people by religion", "P159": "companies by seat", "P176": "products by maker", "P178": "software by maker",
    "P190": "twin cities", "P264": "musicians by label", "P276": "things by location", "P364": "works by language",
    "P407": "texts by language", "P413": "players by position", "P449": "series by broadcaster", "P463": "members of organisations",
    "P495": "things by country of origin", "P641": "players by sport", "P740": "bands by place", "P937": "people by place of work",
    "P1303": "musicians by instrument", "P1412": "people by language",
}  # fmt: skip


def subjects(data: Path) -> dict[str, set[str]]:
    """{relation: subjects}."""
    relations: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    out: dict[str, set[str]] = collections.defaultdict(set)
    for record in json.loads((data / "counterfact_original_format_1545.json").read_text(encoding="utf-8")):
        asked = record["requested_rewrite"]
        relations[asked["prompt"]][asked["relation_id"]] += 1
    for part in ("edit", "train", "val"):
        for record in json.loads((data / f"counterfact-{part}.json").read_text(encoding="utf-8")):
            prompt = record["prompt"].replace(record["subject"], "{}", 1)
            if prompt in relations:
                out[relations[prompt].most_common(1)[0][0]].add(record["subject"].strip())
    return out


def main() -> None:
    found = subjects(Path(sys.argv[1]))
    lines = ["# Subjects of CounterFact (Meng et al. 2022; MIT, Copyright (c) 2022 Kevin Meng) by relation"]
    for relation in sorted(found, key=lambda r: int(r[1:])):
        names = sorted(name for name in found[relation] if ";" not in name and "\n" not in name)
        lines.append(f"{KINDS[relation]}: {'; '.join(names)}")
    OUT.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {sum(map(len, found.values())):,} names of {len(found)} relations")


if __name__ == "__main__":
    main()
