"""Text: corpora to read, second moments of what a model makes of them, and other surfaces of a fact."""
