"""The input of a job: find its files, check their columns and read their rows."""

from moray.batch.input.files import InputFiles, read_input

__all__ = ["InputFiles", "read_input"]
