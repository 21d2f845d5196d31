"""Set up Triton before any kernel is imported."""

import triton_device  # noqa: F401
