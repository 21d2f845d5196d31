"""List the files that `input.path` names: a file, a folder (with all below it), a glob, or a list of them."""

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyarrow import fs

from moray.batch.input.formats import CSV, JSON, WANTED, Format, convert_csv, find_format, is_wanted
from moray.batch.input.hub import locate_input
from moray.batch.input.links import check_links
from moray.batch.input.tables import check_above, check_listed, is_metadata
from moray.batch.spec.input_section import FormatChoice
from moray.engine.errors import InputError

_SHOWN = 5  # names that are listed in a message


@dataclass(frozen=True)
class Listing:
    """Holds the files of an input.

    root:     path in the filesystem that all files are below
    format:   the format of all files
    files:    (path relative to root, size in bytes), sorted
    folders:  the given paths that are folders
    globs:    the given paths that are patterns
    left_out: files in the folders and under the globs that are left out because of their names, without hidden ones
    missed:   files of the format beside those that a glob found, which it does not match
    """

    filesystem: fs.FileSystem
    root: str
    format: Format
    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    globs: tuple[str, ...]
    left_out: tuple[str, ...]
    missed: tuple[str, ...] = ()

    def full_path(self, path: str) -> str:
        return posixpath.join(self.root, path)


def list_files(paths: Sequence[str], choice: FormatChoice = "auto") -> Listing:
    """Find the files that the paths name.

    A file named in full is included whatever its name. Folders and globs give the files that are named as those of the
    format, but no file whose name or folder starts with `_` or `.`. Raises InputError where a path names nothing, where
    files have different formats, and where a folder is a table whose files are not all part of it.
    """
    found: dict[str, int] = {}
    roots: list[str] = []
    folders: list[str] = []
    globs: list[str] = []
    filesystems: list[fs.FileSystem] = []
    left_out: dict[str, None] = {}
    missed: dict[str, None] = {}
    for path in paths:
        filesystem, inner = locate_input(path)
        try:
            root, expanded, beside = _expand(filesystem, inner)
            infos = [info for info in expanded if info.path == inner or is_wanted(info.base_name, choice)]
            others = [info.path for info in expanded if info.path != inner and not is_wanted(info.base_name, choice)]
            if root == inner:
                folders.append(inner)
            elif [info.path for info in infos] != [inner]:
                globs.append(inner)
            if not infos:
                raise InputError(f"{path}: {_why_nothing(filesystem, inner, others, choice)}")
        except OSError as error:
            raise InputError(f"{path}: cannot be listed: {error}") from None
        found |= {info.path: info.size for info in infos}
        left_out |= dict.fromkeys(others)
        missed |= dict.fromkeys(info.path for info in beside if is_wanted(info.base_name, choice))
        roots.append(root)
        filesystems.append(filesystem)
    if any(other != filesystems[0] for other in filesystems):
        raise InputError(f"input.path: all paths must be on one filesystem, are {', '.join(paths)}")
    root = posixpath.commonpath(roots)

    def relative(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(posixpath.relpath(path, root) for path in names if path not in found))

    return Listing(
        filesystem=filesystems[0],
        root=root,
        format=find_format(found, choice),
        files=tuple(sorted((posixpath.relpath(path, root), size) for path, size in found.items())),
        folders=tuple(folders),
        globs=tuple(globs),
        left_out=relative(left_out),
        missed=relative(missed),
    )


def _expand(filesystem: fs.FileSystem, path: str) -> tuple[str, list[fs.FileInfo], list[fs.FileInfo]]:
    """Return the folder that relative paths start from, the files of any name, and those beside them that the last
    part of a glob does not match."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return posixpath.dirname(path), [info], []
    if info.type == fs.FileType.Directory:
        check_above(filesystem, path)
        return path, list(_files_in(filesystem, path)), []
    root, pattern = _split(path)
    if not pattern:
        return root, [], []
    check_above(filesystem, root)
    if filesystem.type_name == "gcs":  # Arrow lists a folder there only if an object has its name
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        check_listed(filesystem, infos)
        files = [info for info in infos if info.type == fs.FileType.File]
        parts = [file.path.removeprefix(f"{root}/").split("/") for file in files]
        found = [file for file, part in zip(files, parts, strict=True) if _matches(part, pattern)]
        wider = [file for file, part in zip(files, parts, strict=True) if _matches(part, [*pattern[:-1], "*"])]
        return root, found, [file for file in wider if file not in found]
    beside: list[fs.FileInfo] = []
    return root, list(_glob(filesystem, root or "/", pattern, beside)), beside


def _split(glob: str) -> tuple[str, list[str]]:
    """Return the folder before the first pattern, and the path's parts from there on."""
    parts = glob.split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    return "/".join(parts[:fixed]), parts[fixed:]


def would_find(glob: str, path: str) -> bool:
    """Return whether a glob would find a Parquet file with this path."""
    root, pattern = _split(glob)
    return path.startswith(f"{root}/") and _matches(path.removeprefix(f"{root}/").split("/"), pattern)


def _glob(
    filesystem: fs.FileSystem, folder: str, pattern: list[str], beside: list[fs.FileInfo]
) -> Iterator[fs.FileInfo]:
    """Yield the files below `folder` that match the pattern, one part a level. A folder that matches gives all files
    below it.

    beside:  gets the files of the last level that do not match
    """
    if not pattern:
        yield from _files_in(filesystem, folder)
        return
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        yield from _glob(filesystem, folder, rest, beside)
        if not rest:
            return
    for info in _children(filesystem, folder):
        if _is_hidden(info.base_name) and not _is_hidden(first):
            continue
        if first == "**":
            if info.type == fs.FileType.Directory:
                yield from _glob(filesystem, info.path, pattern, beside)
        elif fnmatchcase(info.base_name, first):
            if info.type == fs.FileType.Directory:
                yield from _glob(filesystem, info.path, rest, beside)
            elif not rest:
                yield info
        elif not rest and info.type == fs.FileType.File:
            beside.append(info)


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
        infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
        check_listed(filesystem, infos)
        for info in infos:
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
    check_listed(filesystem, infos)
    for info in infos:
        if is_metadata(info):
            check_listed(filesystem, filesystem.get_file_info(fs.FileSelector(info.path)))
    return infos


def _why_nothing(filesystem: fs.FileSystem, path: str, others: Sequence[str], choice: FormatChoice) -> str:
    wanted = f"files named {WANTED[choice]}"
    if others:
        names = list(map(posixpath.basename, others))
        wanted += f"; there is {name_some(names)}"
        if csv := [name for name in names if CSV.fullmatch(name)]:
            wanted += f". {convert_csv(csv[0])}"
        elif choice == "auto" and any(map(JSON.fullmatch, names)):
            wanted += ". Set input.format: jsonl if they have one JSON object a line"
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


def _is_hidden(name: str) -> bool:
    return name.startswith(("_", "."))
