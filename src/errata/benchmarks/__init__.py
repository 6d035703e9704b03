"""Benchmarks: files of other people's formats, and the almanac's own, as cases to edit and questions to score; no torch."""
