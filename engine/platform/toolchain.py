"""Check what Triton needs to launch its kernels: a C compiler and Python's headers."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

COMPILERS = ("gcc", "clang")  # in the order in which Triton looks for them


def find_toolchain_problems() -> list[str]:
    """Return what is missing, each with the fix; empty if Triton can build its launchers."""
    return list(_find())


def has_built_launchers() -> bool:
    """Return whether Triton's cache holds modules that were built before; then it may not need a compiler."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(cache) if cache else home / ".triton" / "cache"
    return any(folder.glob("*/*.so"))


def _find() -> Iterator[str]:
    compiler = os.environ.get("CC")
    if compiler is not None:
        if shutil.which(compiler.split()[0] if compiler.strip() else "") is None:
            yield f"CC is {compiler!r}, and there is no such program: unset it, or name a C compiler"
    elif not any(map(shutil.which, COMPILERS)):
        yield f"no C compiler ({' or '.join(COMPILERS)}) is on the PATH: apt-get install gcc, or set CC"
    # Debian's Python has a default scheme under /usr/local, where its headers are not. Triton corrects that too.
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").exists():
        package = f"python{sysconfig.get_python_version()}-dev"
        yield f"Python's headers are not in {headers}: apt-get install {package} (dnf: python3-devel)"
