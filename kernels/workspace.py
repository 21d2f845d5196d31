"""The memory that kernels allocate in addition to their arguments. No torch: memory is planned with this too."""

# The maximum that kernels/gpu/paged_attention.py allocates for the partial results of keys split among programs.
ATTENTION_BYTES = 2**28
