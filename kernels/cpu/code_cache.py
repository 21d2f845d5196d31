"""Keep machine code on disk, in one folder for all that is compiled from the same sources in the same way.

Numba compares its own version, the processor, and the file of the function that is called. It looks neither at the
files of the functions that are compiled into it, nor at the compiler's options. After a change of those it would load
old code, which computes something else. So the folder's name is a hash of what Numba does not compare.
"""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import UserProvidedCacheLocator
from numba.core.registry import cpu_target

from moray.kernels.cache_root import cache_root

SOURCES = Path(__file__).parent
NAME = re.compile("moray-[0-9a-f]{16}")
KEPT_S = 30 * 24 * 3600  # a folder that no process has used for so long is deleted

# What in numba.config changes machine code. USING_SVML is whether Intel's library of vector functions was found.
OPTIONS = (
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "EXTEND_VARIABLE_LIFETIMES",
    "LLVM_REFPRUNE_FLAGS",
    "LLVM_REFPRUNE_PASS",
    "LOOP_VECTORIZE",
    "OPT",
    "SLP_VECTORIZE",
    "USING_SVML",
)

_changing_config = RLock()


class Locator(UserProvidedCacheLocator):  # type: ignore[misc]  # numba is not typed here
    """Tells Numba where the code of a function lies: for these sources in one place, wherever they are installed.

    Numba's own locator has the path of the source in the name. Each clone, each environment, and each package that is
    sent to a cluster would compile everything again.
    """

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        if Path(py_file).parent == SOURCES:
            return SOURCES.name
        return str(super().get_suitable_cache_subpath(py_file))


def cached(compile_it: Callable[[bool], Any]) -> Any:
    """Return compile_it(cache) with cache=True, so that Numba loads and saves code; False if no folder can be written.

    compile_it: calls a decorator of Numba with this value of `cache`
    """
    folder = code_folder()
    if folder is not None:
        # RuntimeError: the folder has become read-only; OSError: the disk is full
        with suppress(RuntimeError, OSError), _numba_caches_in(folder):
            result = compile_it(True)
            if not numba.config.DISABLE_JIT:  # else it is the function as it was
                _lock_saves(result._cache, folder)
            return result
    return compile_it(False)


@cache
def code_folder() -> Path | None:
    """Return the folder of the code that these sources give here; None if no folder can be written.

    It is below NUMBA_CACHE_DIR, else below the folder of moray's caches, else below the folder of temporary files.
    """
    name = f"moray-{_hash(SOURCES)}"
    return next((place / name for place in _places() if _use(place / name)), None)


def _places() -> Iterator[Path]:
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR)
    with suppress(RuntimeError):  # the user has no home
        yield cache_root() / "numba"
    with suppress(OSError):
        # Loading code means to run it, so a folder that another user has made under this name is left alone.
        temporary = Path(tempfile.gettempdir()) / f"moray-numba-{os.getuid()}"
        temporary.mkdir(mode=0o700, exist_ok=True)
        status = temporary.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            yield temporary


def _hash(sources: Path) -> str:
    """Return a hash of all that machine code depends on."""
    digest = hashlib.sha256()
    for path in sorted(sources.glob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.name} {len(text)}\n".encode() + text)
    options = [str(getattr(numba.config, name, None)) for name in OPTIONS]
    processor = cpu_target.target_context.codegen().magic_tuple()
    digest.update(repr((numba.__version__, llvmlite.__version__, np.__version__, options, processor)).encode())
    return digest.hexdigest()[:16]


def _use(folder: Path) -> bool:
    """Make the folder if necessary and note the time of use; return whether it can be written."""
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        os.utime(folder)
    except OSError:
        return False
    if is_new:  # the sources have changed, which is when folders become old
        _delete_unused(folder.parent, time.time() - KEPT_S)
    return True


def _delete_unused(place: Path, before: float) -> None:
    """Delete the folders that were last used before a time. Where one is still in use, its process compiles again."""
    for folder in place.iterdir():
        with suppress(OSError):
            if NAME.fullmatch(folder.name) and folder.lstat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _numba_caches_in(folder: Path) -> Iterator[None]:
    """Let functions that are decorated in the block be cached in the folder, and nowhere else.

    The environment stays as it is: processes that start from here may run other sources.
    """
    config = numba.config
    with _changing_config:
        before = config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES
        config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = str(folder), f"{__name__}.{Locator.__name__}"
        try:
            yield
        finally:
            config.CACHE_DIR, config.CACHE_LOCATOR_CLASSES = before


def _lock_saves(of_function: Any, folder: Path) -> None:
    """Let one process at a time save code in a folder, and go on without saving where that fails.

    Numba numbers a function's files by its index. Two processes that save for different types at once could both take
    the same number, and the index would then name the other's code.
    """
    save = of_function.save_overload

    def save_overload(signature: Any, code: Any) -> None:
        with suppress(OSError), open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            save(signature, code)

    of_function.save_overload = save_overload
