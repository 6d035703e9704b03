"""The engine: the frozen model, patches as hooks beside it, banks of them by row, the tail, and the fit of many problems at once."""
