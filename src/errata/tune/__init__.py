"""Settings for a model: a search on facts that it knows, and files of what was found (`errata tune`)."""
