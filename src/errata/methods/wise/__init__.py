"""WISE and WISE-light: edits in a side memory beside one MLP matrix, and a decision which of the two answers."""
