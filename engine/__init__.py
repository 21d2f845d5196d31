"""The inference engine: models, checkpoint loading, scheduling and sampling. See docs/architecture.md."""

import os

# torch's libraries read these variables when they are loaded. A value that the user has set is kept.
#
# OpenMP threads spin while they wait, by default for milliseconds. When another process needs the cores (Ray's
# processes are always there), a spinning thread keeps the thread that it waits for from running: 100 times slower on
# two cores. Not spinning at all costs a fifth on idle cores; spinning for some microseconds costs almost nothing on
# busy or idle cores (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# oneDNN caches a compiled kernel for each number of rows, by default up to 1,024 kernels: 100 MB that are rarely
# used again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
