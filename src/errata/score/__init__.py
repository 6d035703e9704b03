"""Scoring: what a model says before and after an edit, and what can be concluded from it."""
