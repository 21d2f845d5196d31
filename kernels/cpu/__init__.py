"""The kernels of the CPU, which Numba compiles."""

import os

import numba

# At LLVM's level 3 a function that had been compiled alone came out wrong when it was compiled again as a part of its
# caller: a kernel was right in the process that compiled it and gave zeros when loaded from the cache. It was right at
# level 2, which is as fast here (docs/log.md). Numba reads the level when it compiles the first function.
os.environ.setdefault("NUMBA_OPT", "2")
numba.config.reload_config()
