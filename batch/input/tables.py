"""Refuse the folders of table formats, which also hold files that are no part of the table any more."""

import posixpath
from collections.abc import Iterable

from pyarrow import fs

from moray.engine.errors import InputError

_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}  # a folder in the table -> the format
_METADATA, _ICEBERG = "metadata", ".metadata.json"
_DATA = "data"  # the folder with the files of an Iceberg table
_SCHEMES = {"s3": "s3://", "gcs": "gs://"}  # type of a filesystem -> what its paths lack as addresses
_FIXES = {
    "Delta": """list the current ones in input.path, as deltalake's DeltaTable("{0}").file_uris() returns them, """
    """or copy the rows: duckdb -c "COPY (FROM delta_scan('{0}')) TO 'rows.parquet'\"""",
    "Iceberg": """copy the rows: duckdb -c "COPY (FROM iceberg_scan('{0}')) TO 'rows.parquet'\"""",
    "Hudi": """copy the rows: spark.read.format("hudi").load("{0}").write.parquet("rows")""",
}


def check_listed(filesystem: fs.FileSystem, infos: Iterable[fs.FileInfo]) -> None:
    """Raise InputError where what was listed, at any depth, is part of a table."""
    for info in infos:
        parent, name = posixpath.split(info.path)
        if name in _LOGS:
            raise _refusal(filesystem, _LOGS[name], parent)
        for log, kind in _LOGS.items():  # a store lists objects, and no folders
            if f"/{log}/" in info.path:
                raise _refusal(filesystem, kind, info.path.partition(f"/{log}/")[0])
        if name.endswith(_ICEBERG) and posixpath.basename(parent) == _METADATA:
            raise _refusal(filesystem, "Iceberg", posixpath.dirname(parent))


def is_metadata(info: fs.FileInfo) -> bool:
    """Return whether a folder may be that of an Iceberg table's metadata."""
    return bool(info.type == fs.FileType.Directory and info.base_name == _METADATA)


def check_above(filesystem: fs.FileSystem, folder: str) -> None:
    """Raise InputError where a folder is a table, or a partition or the data of one."""
    while folder:
        for log, kind in _LOGS.items():
            if filesystem.get_file_info(f"{folder}/{log}").type == fs.FileType.Directory:
                raise _refusal(filesystem, kind, folder)
        if is_metadata(filesystem.get_file_info(f"{folder}/{_METADATA}")):
            check_listed(filesystem, filesystem.get_file_info(fs.FileSelector(f"{folder}/{_METADATA}")))
        parent, name = posixpath.split(folder)
        if parent == folder or not ("=" in name or name == _DATA):
            return
        folder = parent


def _refusal(filesystem: fs.FileSystem, kind: str, path: str) -> InputError:
    table = f"{_SCHEMES.get(filesystem.type_name, '')}{path}"
    what = f"{table}: is a table of {kind}: its folder also holds files that are no part of it any more"
    return InputError(f"{what}; {_FIXES[kind].format(table)}")
