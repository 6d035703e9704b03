"""Writes tests/data/benchmarks: the first five records of each benchmark whose licence allows it, unchanged.

python scripts/make_benchmark_samples.py DATA        DATA: a folder with the files as the table below names them
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from errata.benchmarks.records import read_records

OUT = Path(__file__).parents[1] / "tests" / "data" / "benchmarks"
COUNT = 5
SAMPLES = {
    "wiki-recent.json": "knowedit/recent_test.json",
    "wiki-counterfact.jsonl": "knowedit/wiki_counterfact_test_cf-generate-10.json",
    "wikibio.json": "knowedit/benchmark_WikiBio_wikibio-test-all.json",
    "convsent.json": "knowedit/benchmark_Convsent_blender_test.json",
    "counterfact-flattened.json": "counterfact/counterfact-edit.json",
    "counterfact-original.json": "counterfact/counterfact_distracting_neighbor.json",
    "counterfact-alias.json": "counterfact/counterfact_subject_replace.json",
    "mquake.json": "mquake/MQuAKE-hard.first30.json",
    "qaedit.json": "qaedit/QAEdit_inter_1k.first50.json",
    "nq-open.jsonl": "nq_open/NQ-open.dev.jsonl",
    "known1000.json": "known1000/known_1000.json",
}


def main(data: Path) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, path in SAMPLES.items():
        lines = [json.dumps(r.values, ensure_ascii=False) for r in itertools.islice(read_records(data / path), COUNT)]
        text = "\n".join(lines) if name.endswith("l") else "[\n" + ",\n".join(lines) + "\n]"
        (OUT / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
