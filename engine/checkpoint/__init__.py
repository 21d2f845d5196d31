"""A model folder on disk: its config, its weight files, what identifies it."""
