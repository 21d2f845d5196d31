"""Where Triton's kernels run under test: on the GPU, else under the interpreter. Import before any kernel."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    import faster_interpreter
    import triton_interpreter

    triton_interpreter.repair()
    faster_interpreter.make_faster()
