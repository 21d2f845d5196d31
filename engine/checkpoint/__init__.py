"""Read a model folder: its config, its weight files and its identity."""
