"""The model and what runs it. See docs/architecture.md."""

import os

# OpenMP's threads spin while they wait, unless told otherwise before torch loads its library. Beside any other process
# that wants the cores (Ray's are always there) a spinning thread keeps the one it waits for from running: measured
# 100 times slower on two busy cores, and no slower on quiet ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
