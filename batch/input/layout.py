"""Layout: how the files of an input hold their rows."""

from dataclasses import dataclass

from moray.batch.input.formats import Format


@dataclass(frozen=True)
class Layout:
    """Describes the files of an input, for whoever reads them.

    format:     format of all files
    hive_keys:  columns that are in the names of folders
    """

    format: Format = "parquet"
    hive_keys: tuple[str, ...] = ()


PARQUET = Layout()
