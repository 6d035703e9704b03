"""Causal tracing: which states of the model a fact's answer hangs on (`cells`), and what that says over many facts (`average`)."""

from errata.trace.average import ROLES, Average, Suggestion, average, roles, suggest_layers
from errata.trace.cells import trace
from errata.trace.facts import KINDS, Fact, Settings, Skipped, Traced, Traces, default_window

__all__ = [
    "KINDS",
    "ROLES",
    "Average",
    "Fact",
    "Settings",
    "Skipped",
    "Suggestion",
    "Traced",
    "Traces",
    "average",
    "default_window",
    "roles",
    "suggest_layers",
    "trace",
]
