"""Resolves a path of the spec to a filesystem and a path in it.

Paths are used as they are written: nothing in them is percent-decoded, and `?`, `#`, `[` and spaces are ordinary
characters of a name.
"""

import os
import re

from pyarrow import ArrowInvalid, fs

from moray.engine.errors import UserError

SCHEMES = ("s3", "gs", "file")
_ADDRESS = re.compile(r"(?P<scheme>[^:/]*)://(?P<host>[^/?]*)(?P<path>.*)", re.DOTALL)
# The options that Arrow accepts at the end of an address. Any other `?` belongs to the path.
_OPTION_NAMES = (
    "region|scheme|endpoint_override|allow_bucket_creation|allow_bucket_deletion|force_virtual_addressing|"
    "tls_ca_file_path|retry_limit_seconds|check_directory_existence_before_creation"
)
_OPTIONS = re.compile(rf"\?(?:{_OPTION_NAMES})=[^&?]*(?:&(?:{_OPTION_NAMES})=[^&?]*)*$")


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a path, and the path in it.

    path:  a local path (relative to the current directory), or an s3:// or gs:// address

    Raises UserError where there is no such filesystem.
    """
    address = _ADDRESS.fullmatch(path)
    if address is None:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))
    scheme, host, path_in_bucket = address["scheme"], address["host"], address["path"]
    if scheme not in SCHEMES:
        raise UserError(f"{path}: must be a local path or start with {', '.join(s + '://' for s in SCHEMES)}")
    if scheme == "file":
        if host not in ("", "localhost") or not path_in_bucket.startswith("/"):
            raise UserError(f"{path}: must be file:// and an absolute path, such as file:///data")
        return fs.LocalFileSystem(), os.path.abspath(path_in_bucket)
    if not host:
        raise UserError(f"{path}: must name a bucket, as in {scheme}://bucket/folder")
    options = _OPTIONS.search(path_in_bucket)
    if options is not None:
        path_in_bucket = path_in_bucket[: options.start()]
    try:
        filesystem, bucket = fs.FileSystem.from_uri(f"{scheme}://{host}{options[0] if options else ''}")
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be opened: {error}") from None
    return filesystem, f"{bucket.rstrip('/')}{path_in_bucket}".rstrip("/")
