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
    """

    filesystem: fs.FileSystem
    root: str
    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]

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
    filesystems: list[fs.FileSystem] = []
    for path in paths:
        filesystem, inner = locate(path)
        try:
            root, infos = _expand(filesystem, inner)
            folders += [inner] if root == inner else []
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
    return Listing(filesystems[0], root, tuple(files), tuple(folders))


def _expand(filesystem: fs.FileSystem, path: str) -> tuple[str, list[fs.FileInfo]]:
    """The folder that relative paths start from, and the files."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return posixpath.dirname(path), [info]
    if info.type == fs.FileType.Directory:
        return path, list(_parquet_in(filesystem, path))
    parts = path.split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    root = "/".join(parts[:fixed])
    return root, list(_match(filesystem, root or "/", parts[fixed:])) if fixed < len(parts) else []


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
