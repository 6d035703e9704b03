"""Token ids and greedy answers of llama.cpp (package xllamacpp), run as a process of its own: a job as JSON on stdin, the result on stdout.

llama.cpp multiplies quantised weights with activations that it rounds to 8 bits; ``unpacked`` writes the same weights as float32, so
that what is compared is how a file is read and not how it is rounded.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def unpacked(path: Path, out: Path) -> Path:
    """The same GGUF with all weights in float32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            listed = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if listed else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """{"ids": of each text, "answers": the new tokens of each prompt}."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_gpu_layers, asked.warmup = job["model"], 512, 0, False
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(asked)

    def post(path: str, **body: Any) -> Any:
        asked = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(asked))

    ids = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in job["texts"]]
    how = {"n_predict": job["tokens"], "temperature": 0, "top_k": 1, "cache_prompt": False, "return_tokens": True}
    return {"ids": ids, "answers": [post("/completion", prompt=prompt, **how)["tokens"] for prompt in job["prompts"]]}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
