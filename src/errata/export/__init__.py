"""Patches for programs that know nothing of errata: a checkpoint with the edits in its weights, a LoRA adapter, files for llama.cpp."""

from errata.export.checkpoint import bake
from errata.export.gguf import bake_gguf, export_gguf
from errata.export.lora import export_lora

__all__ = ["bake", "bake_gguf", "export_gguf", "export_lora"]
