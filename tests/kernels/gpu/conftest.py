"""Before any kernel is imported."""

import triton_device  # noqa: F401
