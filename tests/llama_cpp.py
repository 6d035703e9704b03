"""llama.cpp (package xllamacpp), run as a process of its own, in an environment of its own (`make llama-cpp`) or in this one.

``ask`` gives it a job: token ids of texts, greedy answers of prompts, under adapters or none.
llama.cpp multiplies quantised weights with activations that it rounds to 8 bits; ``unpacked`` writes the same weights as float32, so
that what is compared is how a file is read and not how it is rounded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

_HOME = Path(__file__).resolve().parents[1] / ".engines" / "llama-cpp" / "bin" / "python"
ABSENT = "llama.cpp is not installed: make llama-cpp"


def python() -> str | None:
    """The interpreter that has llama.cpp."""
    if importlib.util.find_spec("xllamacpp") is not None:
        return sys.executable
    named = Path(os.environ.get("ERRATA_LLAMA_CPP") or _HOME)
    return str(named) if named.exists() else None


def ask(**job: Any) -> dict[str, Any]:
    """See `answer`."""
    done = subprocess.run([str(python()), __file__], input=json.dumps(job), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unpacked(path: Path, out: Path) -> Path:
    """The same GGUF with all weights in float32."""
    import ggufs

    return ggufs.rewritten(path, out, lambda _, tensor: (ggufs.numbers(tensor), None), without=("general.file_type",))


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """{"ids": of each of ``texts``, "answers": the new tokens of each of ``prompts``, "said": their text, "first": {token: its
    log-probability} of the likeliest first tokens}.  ``lora``: adapters beside ``model``; ``scales``: theirs at each prompt, 0 where one
    is not named and so does not act."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_gpu_layers, asked.warmup = job["model"], 512, 0, False
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1  # more wait for each other on a busy machine
    asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in job.get("lora", ())]
    server = xllamacpp.Server(asked)

    def post(path: str, **body: Any) -> Any:
        asked = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(asked))

    ids = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in job.get("texts", ())]
    how = {"n_predict": job["tokens"], "temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True, "n_probs": 5}
    scales = job.get("scales") or [[1.0] * len(job.get("lora", ()))] * len(job["prompts"])
    said = [
        # an empty list is none at all: then each acts as when the server began
        post("/completion", prompt=prompt, **how, lora=[on for on in named if on["scale"]] or named[:1])
        for prompt, own in zip(job["prompts"], scales, strict=True)
        for named in [[{"id": i, "scale": scale} for i, scale in enumerate(own)]]
    ]
    first = [{t["id"]: t["logprob"] for t in one["completion_probabilities"][0]["top_logprobs"]} for one in said]
    return {"ids": ids, "answers": [one["tokens"] for one in said], "said": [one["content"] for one in said], "first": first}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))), flush=True)
    os._exit(0)  # its threads wait for requests
