"""The input of a job: which files and columns it is, and how its rows are read."""

from batch.input.files import InputFiles, read_input

__all__ = ["InputFiles", "read_input"]
