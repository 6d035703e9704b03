"""What becomes of the records of real benchmark files: the tables of docs/benchmarks.md.

python scripts/benchmark_counts.py DATA              DATA: a folder with the files as FILES names them
"""

from __future__ import annotations

import sys
from pathlib import Path

from errata.benchmarks.files import open_benchmark

FILES = (
    ("zsre", "zsre/zsre_mend_edit.json"),
    ("zsre", "zsre/zsre_mend_train-1k.first300.json"),
    ("zsre", "zsre/zsre_subject_replace.json"),
    ("zsre", "zsre/zsre_inverse_relation.json"),
    ("zsre", "knowedit/benchmark_ZsRE_ZsRE-test-all.json"),
    ("zsre", "zsre/ZsRE-test-all-prompt10-v2.json"),
    ("counterfact", "counterfact/counterfact-edit.json"),
    ("counterfact", "counterfact/counterfact-train.json"),
    ("counterfact", "counterfact/counterfact-val.json"),
    ("counterfact", "counterfact/counterfact_original_format_1545.json"),
    ("counterfact", "counterfact/counterfact_portability_gpt4.json"),
    ("counterfact", "counterfact/counterfact_distracting_neighbor.json"),
    ("counterfact", "counterfact/counterfact_subject_replace.json"),
    ("counterfact", "counterfact/intersected_counterfact_known.json"),
    ("wiki-recent", "knowedit/recent_test.json"),
    ("wiki-recent", "knowedit/benchmark_wiki_recent_recent_train.json"),
    ("wiki-counterfact", "knowedit/wiki_counterfact_test_cf-generate-10.json"),
    ("wiki-counterfact", "knowedit/test_cf_839.json"),
    ("wiki-counterfact", "knowedit/benchmark_wiki_counterfact_train_cf.json"),
    ("wikibio", "knowedit/benchmark_WikiBio_wikibio-test-all.json"),
    ("wikibio", "knowedit/benchmark_WikiBio_wikibio-train-all.json"),
    ("convsent", "knowedit/benchmark_Convsent_blender_test.json"),
    ("convsent", "knowedit/benchmark_Convsent_blender_val.json"),
    ("mquake", "mquake/AKEW_MQuAKE-CF_354.first20.json"),
    ("mquake", "mquake/MQuAKE-hard.first30.json"),
    ("wise-hallucination", "wise/hallucination-edit.first50.json"),
    ("wise-temporal", "wise/temporal-edit.first20.json"),
    ("qaedit", "qaedit/QAEdit_inter_1k.first50.json"),
    ("unke", "unke/UnKE_final_data_v2.first30.json"),
    ("peak", "peak/PEAK_time.first30.json"),
    ("piqa", "piqa/valid.jsonl"),
    ("nq-open", "nq_open/NQ-open.dev.jsonl"),
    ("known1000", "known1000/known_1000.json"),
)


def counted(counts: dict[str, int]) -> str:
    return "; ".join(f"{n:,} {what}" for what, n in counts.items()) or "–"


def rows(data: Path) -> tuple[list[str], list[str]]:
    """(a line a file with counts, a line for each reason something was left out or is odd)."""
    table, reasons = [], []
    for name, path in FILES:
        benchmark = open_benchmark(name, data / path)
        items = list(benchmark.load())
        if benchmark.kind != "edits":
            table.append(f"| {name} | `{path}` | {len(items):,} | {len(items):,} {benchmark.kind} | – | – |")
            continue
        report = benchmark.report
        kinds = {kind: report.probes[kind] for kind in benchmark.probes if report.probes[kind]}
        dropped = report.dropped.total() + report.joined
        left = report.left_out.total()
        table.append(
            f"| {name} ({report.form}) | `{path}` | {report.records:,} | {report.cases:,} | {counted(kinds)} | {dropped} / {left} |"
        )
        said = report.lines()[1:]
        reasons += [f"- `{path}`: {'. '.join(line[0].upper() + line[1:] for line in said)}."] if said else []
    return table, reasons


def text(data: Path) -> str:
    table, reasons = rows(data)
    head = [
        "| benchmark (form) | file | records | cases | probes | records not a case of their own / probes left out |",
        "|---|---|---:|---:|---|---:|",
    ]
    return "\n".join([*head, *table, "", "What was left out, and what a reader of scores should know:", "", *reasons, ""])


if __name__ == "__main__":
    print(text(Path(sys.argv[1])), end="")
