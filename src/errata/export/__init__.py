"""Patches for programs that know nothing of errata: a checkpoint with the edits in its weights, or a LoRA adapter."""

from errata.export.checkpoint import bake
from errata.export.lora import export_lora

__all__ = ["bake", "export_lora"]
