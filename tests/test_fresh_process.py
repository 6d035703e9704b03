"""A saved patch of every method, loaded by a process that knows only the files, gives the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from laws import METHODS, PROMPTS, in_chat, model, patches, rows
from safetensors.torch import save_file
from tiny import saved

LOADER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import errata
folder = Path(sys.argv[1])
lm, told = errata.load(folder / "model"), json.loads((folder / "told.json").read_text())
wanted = load_file(folder / "logits.safetensors")
batch = lm.batch(lm.encode(told["prompts"]))
out = {}
for path in sorted((folder / "patches").iterdir()):
    patch = errata.Patch.load(path)
    with lm.under(patch):
        texts = lm.generate(told["prompts"]) + lm.generate(told["prompts"], chat=True, max_new_tokens=4)
        logits = lm.logits(batch)
    out[path.name] = {"texts": texts, "apart": float((logits - wanted[path.name]).abs().max()), "id": patch.id}
print(json.dumps(out))
"""


def test_every_method(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    base = in_chat(model("llama"))
    base.tokenizer.save_pretrained(tmp_path / "model")
    batch, _ = rows(base)
    logits, texts, ids = {}, {}, {}
    for method in METHODS:
        patch = patches(method, "llama")[0]
        patch.save(tmp_path / "patches" / method)
        logits[method], texts[method], ids[method] = base.logits(batch, [(patch,)]).contiguous(), [], patch.id
        with base.under(patch):
            texts[method] = base.generate(PROMPTS) + base.generate(PROMPTS, chat=True, max_new_tokens=4)
    save_file(logits, tmp_path / "logits.safetensors")
    (tmp_path / "told.json").write_text(json.dumps({"prompts": PROMPTS}))
    done = subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == sorted(METHODS)
    for method in METHODS:
        assert found[method]["id"] == ids[method]
        assert found[method]["texts"] == texts[method], method
        assert found[method]["apart"] < 1e-4, method
    untouched = base.logits(batch)
    assert {m for m in METHODS if torch.equal(logits[m], untouched)} <= {"none"}  # the others do something
