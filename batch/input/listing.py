"""List the files that `input.path` names: a file, a folder (with all below it), a glob, or a list of them."""

import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyarrow import fs

from moray.batch.input.links import check_links
from moray.batch.location import locate
from moray.engine.errors import InputError

WANTED = "*.parquet, *.parq or *.pq"
_SHOWN = 5  # names that are listed in a message
_NAME = re.compile(r".*\.(parquet|parq|pq)(\.(snappy|gz|gzip|zstd|zst|lz4|br|brotli))?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Listing:
    """Holds the files of an input.

    root:     path in the filesystem that all files are below
    files:    (path relative to root, size in bytes), sorted
    folders:  the given paths that are folders
    globs:    the given paths that are patterns
    left_out: files in the folders and under the globs that are left out because of their names, without hidden ones
    """

    filesystem: fs.FileSystem
    root: str
    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    globs: tuple[str, ...]
    left_out: tuple[str, ...]

    def full_path(self, path: str) -> str:
        return posixpath.join(self.root, path)


def list_files(paths: Sequence[str]) -> Listing:
    """Find the files that the paths name.

    A file named in full is included whatever its name. Folders and globs give *.parquet, *.parq and *.pq, with or
    without a codec's name after it, but no file whose name or folder starts with `_` or `.`. Raises InputError where a
    path names nothing.
    """
    found: dict[str, int] = {}
    roots: list[str] = []
    folders: list[str] = []
    globs: list[str] = []
    filesystems: list[fs.FileSystem] = []
    left_out: dict[str, None] = {}
    for path in paths:
        filesystem, inner = locate(path)
        try:
            root, expanded = _expand(filesystem, inner)
            infos = [info for info in expanded if info.path == inner or _is_parquet(info.base_name)]
            others = [info.path for info in expanded if info.path != inner and not _is_parquet(info.base_name)]
            if root == inner:
                folders.append(inner)
            elif [info.path for info in infos] != [inner]:
                globs.append(inner)
            if not infos:
                raise InputError(f"{path}: {_why_nothing(filesystem, inner, others)}")
        except OSError as error:
            raise InputError(f"{path}: cannot be listed: {error}") from None
        found |= {info.path: info.size for info in infos}
        left_out |= dict.fromkeys(others)
        roots.append(root)
        filesystems.append(filesystem)
    if any(other != filesystems[0] for other in filesystems):
        raise InputError(f"input.path: all paths must be on one filesystem, are {', '.join(paths)}")
    root = posixpath.commonpath(roots)
    files = sorted((posixpath.relpath(path, root), size) for path, size in found.items())
    others = sorted(posixpath.relpath(path, root) for path in left_out if path not in found)
    return Listing(filesystems[0], root, tuple(files), tuple(folders), tuple(globs), tuple(others))


def _expand(filesystem: fs.FileSystem, path: str) -> tuple[str, list[fs.FileInfo]]:
    """Return the folder that relative paths start from, and the files of any name."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return posixpath.dirname(path), [info]
    if info.type == fs.FileType.Directory:
        return path, list(_files_in(filesystem, path))
    root, pattern = _split(path)
    if pattern and filesystem.type_name == "gcs":  # Arrow lists a folder there only if an object has its name
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        files = [info for info in infos if info.type == fs.FileType.File]
        return root, [file for file in files if _matches(file.path.removeprefix(f"{root}/").split("/"), pattern)]
    return root, list(_glob(filesystem, root or "/", pattern)) if pattern else []


def _split(glob: str) -> tuple[str, list[str]]:
    """Return the folder before the first pattern, and the path's parts from there on."""
    parts = glob.split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    return "/".join(parts[:fixed]), parts[fixed:]


def would_find(glob: str, path: str) -> bool:
    """Return whether a glob would find a Parquet file with this path."""
    root, pattern = _split(glob)
    return path.startswith(f"{root}/") and _matches(path.removeprefix(f"{root}/").split("/"), pattern)


def _glob(filesystem: fs.FileSystem, folder: str, pattern: list[str]) -> Iterator[fs.FileInfo]:
    """Yield the files below `folder` that match the pattern, one part a level. A folder that matches gives all files
    below it."""
    if not pattern:
        yield from _files_in(filesystem, folder)
        return
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        yield from _glob(filesystem, folder, rest)
        if not rest:
            return
    for info in _children(filesystem, folder):
        if _is_hidden(info.base_name) and not _is_hidden(first):
            continue
        if first == "**":
            if info.type == fs.FileType.Directory:
                yield from _glob(filesystem, info.path, pattern)
        elif fnmatchcase(info.base_name, first):
            if info.type == fs.FileType.Directory:
                yield from _glob(filesystem, info.path, rest)
            elif not rest:
                yield info


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match the pattern as in _glob, for a file that need not exist."""
    if not pattern:
        return not any(map(_is_hidden, path))
    if not path:
        return False
    first, rest = pattern[0], pattern[1:]
    is_visible = _is_hidden(first) or not _is_hidden(path[0])
    if first == "**":
        return _matches(path, rest) or (is_visible and _matches(path[1:], pattern))
    return is_visible and fnmatchcase(path[0], first) and _matches(path[1:], rest)


def _files_in(filesystem: fs.FileSystem, folder: str) -> Iterator[fs.FileInfo]:
    """Yield all files below the folder but hidden ones."""
    if not isinstance(filesystem, fs.LocalFileSystem):  # one request lists thousands of files of all folders
        for info in filesystem.get_file_info(fs.FileSelector(folder, recursive=True)):
            below = posixpath.relpath(info.path, folder).split("/")
            if info.type == fs.FileType.File and not any(map(_is_hidden, below)):
                yield info
        return
    for info in _children(filesystem, folder):
        if not _is_hidden(info.base_name):
            yield from _files_in(filesystem, info.path) if info.type == fs.FileType.Directory else [info]


def _children(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    if isinstance(filesystem, fs.LocalFileSystem):
        check_links(folder, _is_hidden)
    infos: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return infos


def _why_nothing(filesystem: fs.FileSystem, path: str, others: Sequence[str]) -> str:
    wanted = f"files named {WANTED}"
    if others:
        wanted += f"; there is {name_some(map(posixpath.basename, others))}"
    if any(map(_is_pattern, path.split("/"))):
        return f"matches no {wanted}"
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        return f"the folder holds no {wanted}"
    return "no such file or folder"


def _is_pattern(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def name_some(names: Iterable[str]) -> str:
    """Format the first names of a list, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _is_parquet(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))
