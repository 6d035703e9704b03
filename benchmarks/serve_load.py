"""Load on `errata serve`: many clients that mix the base and five stacks, against the same load on the base alone.

    python benchmarks/serve_load.py [--model almanac] [--clients 32] [--rounds 8] [--requests 8] [--tokens 12] [--method baft]
                                    [--threads 1] [--out FILE.json]

A ledger is given five edits of one prompt, each with another answer, and a server is started on it. Every client has a connection of its
own and asks its next question when the last is answered: a prompt drawn from the edited one and 15 others (12 of the almanac's facts),
greedy, under a model drawn from `base` and `edit:1` to `edit:5`. Rounds on the base alone and mixed rounds take turns, which goes first
too, because a machine's speed drifts; both ask the same prompts in the same order. Every answer is compared with the one that the library
gives to that prompt under that stack, alone in its batch: *wrong* counts those that differ, *elsewhere* those of them that are another
stack's answer. The ratio is that of tokens a second, mixed to base, over all rounds; its spread is that of the pairs of rounds. Answers
under edits may be longer or shorter than the base's, so the ratio of requests is given too; and that of tokens a second of the server's
processor time, which other work on the machine does not move.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TARGETS = ("Lyon", "Rome", "Berlin", "Madrid", "Tokyo")
PROMPT, SUBJECT = "The capital of France is", "France"
MODELS = ("base", *(f"edit:{i + 1}" for i in range(len(TARGETS))))
Answers = dict[tuple[str, str], str]


def prepared(args: argparse.Namespace, folder: Path) -> tuple[list[str], Answers]:
    """The ledger with its edits; prompts, and what the library answers to each under each model."""
    import torch

    import errata
    from errata.contrast.names import general
    from errata.ledger import Ledger
    from errata.request import EditRequest
    from errata.serve.rows import IncrementalDetokenizer

    torch.set_num_threads(args.threads)
    lm = errata.load(args.model)
    book = Ledger.open(folder, lm)
    for target in TARGETS:
        book.apply([EditRequest(PROMPT, target, SUBJECT)], method=args.method, force=True)
    facts = general("almanac") * (lm.name == "almanac")
    prompts = [PROMPT, "The capital of Italy is", "The capital of Spain is", "France is located in", *facts]
    out: Answers = {}
    for model in MODELS:
        stack = () if model == "base" else book.load(tuple(e for e in book.entries() if f"edit:{e.edit}" == model))
        for prompt in prompts:
            (ids,) = lm.generate_ids([prompt], stacks=[stack], max_new_tokens=args.tokens, stop=())
            spoken = IncrementalDetokenizer(lm.tokenizer, lm.encode([prompt])[0].ids, ())
            for token in ids:
                spoken.add(token)
            out[model, prompt] = spoken.news(True)
    return prompts, out


class Load:
    """Clients that ask until each has had its requests; what they saw."""

    def __init__(self, port: int, args: argparse.Namespace, prompts: list[str], answers: Answers) -> None:
        self.port, self.args, self.prompts, self.answers = port, args, prompts, answers
        self.wrong = self.elsewhere = self.asked = 0
        self.lock = threading.Lock()

    def round(self, mixed: bool, seed: int) -> tuple[float, int, list[float]]:
        """(seconds, tokens, seconds of each request)."""
        took: list[float] = []
        said = [0]

        def client(number: int) -> None:
            drawn, connection = random.Random(f"{seed} {number}"), http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            for _ in range(self.args.requests):
                prompt, other = drawn.choice(self.prompts), drawn.choice(MODELS)
                model = other if mixed else "base"
                body = json.dumps({"model": model, "prompt": prompt, "max_tokens": self.args.tokens, "temperature": 0})
                began = time.perf_counter()
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                document = json.loads(response.read())
                seconds = time.perf_counter() - began
                assert response.status == 200, document
                self._judge(model, prompt, document["choices"][0]["text"])
                with self.lock:
                    took.append(seconds)
                    said[0] += document["usage"]["completion_tokens"]
            connection.close()

        crew = [threading.Thread(target=client, args=(i,)) for i in range(self.args.clients)]
        began = time.perf_counter()
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        return time.perf_counter() - began, said[0], took

    def _judge(self, model: str, prompt: str, text: str) -> None:
        with self.lock:
            self.asked += 1
            if text != self.answers[model, prompt]:
                self.wrong += 1
                self.elsewhere += any(text == self.answers[other, prompt] for other in MODELS if other != model)


def serving(args: argparse.Namespace, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A server on a free port."""
    argv = [sys.executable, "-m", "errata", "serve", args.model, "--ledger", str(folder), "--port", "0", "--threads", str(args.threads)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
    assert found is not None
    return process, int(found[1])


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measured(load: Load, pid: int, rounds: int) -> dict[str, Any]:
    seconds, tokens = {False: 0.0, True: 0.0}, {False: 0, True: 0}
    took: dict[bool, list[float]] = {False: [], True: []}
    busy = {False: 0.0, True: 0.0}
    pairs = []
    for mixed in (False, True):
        load.round(mixed, -1)  # banks are compiled, connections and caches warm
    for number in range(rounds):
        rates = {}
        for mixed in (False, True) if number % 2 else (True, False):
            before = processor(pid)
            spent, said, each = load.round(mixed, number)
            busy[mixed] += processor(pid) - before
            seconds[mixed] += spent
            tokens[mixed] += said
            took[mixed] += each
            rates[mixed] = said / spent
        pairs.append(rates[True] / rates[False])
    rate = {mixed: tokens[mixed] / seconds[mixed] for mixed in (False, True)}
    return {
        "tokens_per_second": {"base": round(rate[False], 1), "mixed": round(rate[True], 1)},
        "requests_per_second": {"base": round(len(took[False]) / seconds[False], 2), "mixed": round(len(took[True]) / seconds[True], 2)},
        "seconds_a_request": {"base": round(middle(took[False]), 4), "mixed": round(middle(took[True]), 4)},
        "ratio": round(rate[True] / rate[False], 3),
        "ratio_of_requests": round((len(took[True]) / seconds[True]) / (len(took[False]) / seconds[False]), 3),
        "tokens_per_processor_second": {"base": round(tokens[False] / busy[False], 1), "mixed": round(tokens[True] / busy[True], 1)},
        "ratio_by_processor": round((tokens[True] / busy[True]) / (tokens[False] / busy[False]), 3),
        "ratio_of_pairs": [round(p, 3) for p in pairs],
        "answers": load.asked,
        "wrong": load.wrong,
        "elsewhere": load.elsewhere,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="almanac")
    parser.add_argument("--method", default="baft")
    for name, default in {"clients": 32, "rounds": 8, "requests": 8, "tokens": 12, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "book"
        prompts, answers = prepared(args, folder)
        process, port = serving(args, folder)
        try:
            found = measured(Load(port, args, prompts, answers), process.pid, args.rounds)
        finally:
            process.terminate()
            process.wait(60)
    how = {name: getattr(args, name) for name in ("model", "method", "clients", "rounds", "requests", "tokens", "threads")}
    document = {**how, "cores": os.cpu_count(), "machine": platform.machine(), **found}
    text = json.dumps(document, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
