"""Causal tracing: which states of the model a fact's answer hangs on (`causal_trace`), and what that says over many facts (`average`)."""

from errata.trace.average import ROLES, AverageEffects, Suggestion, average, roles, suggest_layers
from errata.trace.causal_trace import trace
from errata.trace.facts import KINDS, Fact, FactTrace, Skipped, TraceConfig, TraceResult, default_window

__all__ = [
    "KINDS",
    "ROLES",
    "AverageEffects",
    "Fact",
    "FactTrace",
    "Skipped",
    "Suggestion",
    "TraceConfig",
    "TraceResult",
    "average",
    "default_window",
    "roles",
    "suggest_layers",
    "trace",
]
