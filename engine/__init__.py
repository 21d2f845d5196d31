"""The model and what runs it. See docs/architecture.md."""

import os

# What torch's libraries read when they are loaded; what the user has set stays.
#
# OpenMP's threads spin while they wait, for milliseconds by default. Beside any other process that wants the cores
# (Ray's are always there) a spinning thread keeps the one it waits for from running: 100 times slower on two of them.
# Not spinning at all costs a fifth on quiet ones; some microseconds of it cost next to nothing on either (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# oneDNN keeps a compiled kernel for each number of rows, up to 1,024 of them: 100 MB that are hardly used again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
