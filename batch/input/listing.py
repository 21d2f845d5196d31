"""From `input.path` to the files it names: a file, a folder (with all below it), a glob, or a list of them."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyarrow import fs

from batch.location import locate
from engine.errors import InputError

SUFFIXES = (".parquet", ".parq")


@dataclass(frozen=True)
class Listing:
    """The files of an input.

    root:     path in the filesystem that all files lie under
    files:    (path relative to root, bytes), sorted
    folders:  paths given that are folders
    globs:    paths given that are patterns
    """

    filesystem: fs.FileSystem
    root: str
    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    globs: tuple[str, ...]

    def full_path(self, path: str) -> str:
        return posixpath.join(self.root, path)


def list_files(paths: Sequence[str]) -> Listing:
    """Find the files that the paths name.

    A file named in full is taken whatever its name; of what a folder or a glob holds, *.parquet and *.parq, without
    those in or with a name that starts with `_` or `.`. Raises InputError where a path names nothing.
    """
    found: dict[str, int] = {}
    roots: list[str] = []
    folders: list[str] = []
    globs: list[str] = []
    filesystems: list[fs.FileSystem] = []
    for path in paths:
        filesystem, inner = locate(path)
        try:
            root, infos = _expand(filesystem, inner)
            if root == inner:
                folders.append(inner)
            elif [info.path for info in infos] != [inner]:
                globs.append(inner)
            if not infos:
                raise InputError(f"{path}: {_why_nothing(filesystem, inner)}")
        except OSError as error:
            raise InputError(f"{path}: cannot be listed: {error}") from None
        found |= {info.path: info.size for info in infos}
        roots.append(root)
        filesystems.append(filesystem)
    if any(other != filesystems[0] for other in filesystems):
        raise InputError(f"input.path: all paths must be on one filesystem, are {', '.join(paths)}")
    root = posixpath.commonpath(roots)
    files = sorted((posixpath.relpath(path, root), size) for path, size in found.items())
    return Listing(filesystems[0], root, tuple(files), tuple(folders), tuple(globs))


def _expand(filesystem: fs.FileSystem, path: str) -> tuple[str, list[fs.FileInfo]]:
    """The folder that relative paths start from, and the files."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return posixpath.dirname(path), [info]
    if info.type == fs.FileType.Directory:
        return path, list(_parquet_in(filesystem, path))
    root, pattern = _split(path)
    return root, list(_match(filesystem, root or "/", pattern)) if pattern else []


def _split(glob: str) -> tuple[str, list[str]]:
    """The folder before the first pattern, and the parts from there on."""
    parts = glob.split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    return "/".join(parts[:fixed]), parts[fixed:]


def would_find(glob: str, path: str) -> bool:
    """Whether a glob finds a Parquet file of this path, were it there."""
    root, pattern = _split(glob)
    return path.startswith(f"{root}/") and _fits(path.removeprefix(f"{root}/").split("/"), pattern)


def _match(filesystem: fs.FileSystem, folder: str, pattern: list[str]) -> Iterator[fs.FileInfo]:
    """Files under `folder` that the pattern names, one part a level; a folder that it names gives all below it."""
    if not pattern:
        yield from _parquet_in(filesystem, folder)
        return
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        yield from _match(filesystem, folder, rest)
        if not rest:
            return
    for info in filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        if _is_hidden(info.base_name) and not _is_hidden(first):
            continue
        if first == "**":
            if info.type == fs.FileType.Directory:
                yield from _match(filesystem, info.path, pattern)
        elif fnmatchcase(info.base_name, first):
            if info.type == fs.FileType.Directory:
                yield from _match(filesystem, info.path, rest)
            elif not rest and _is_parquet(info.base_name):
                yield info


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """The rule of _match, for a file that need not be there."""
    if not pattern:
        return not any(map(_is_hidden, path))
    if not path:
        return False
    first, rest = pattern[0], pattern[1:]
    is_seen = _is_hidden(first) or not _is_hidden(path[0])
    if first == "**":
        return _fits(path, rest) or (is_seen and _fits(path[1:], pattern))
    return is_seen and fnmatchcase(path[0], first) and _fits(path[1:], rest)


def _parquet_in(filesystem: fs.FileSystem, folder: str) -> Iterator[fs.FileInfo]:
    for info in filesystem.get_file_info(fs.FileSelector(folder, recursive=True)):
        below = posixpath.relpath(info.path, folder).split("/")
        if info.type == fs.FileType.File and _is_parquet(below[-1]) and not any(map(_is_hidden, below)):
            yield info


def _why_nothing(filesystem: fs.FileSystem, path: str) -> str:
    wanted = f"files named {' or '.join('*' + suffix for suffix in SUFFIXES)}"
    if any(map(_is_pattern, path.split("/"))):
        return f"matches no {wanted}"
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        return f"the folder holds no {wanted}"
    return "no such file or folder"


def _is_pattern(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))
