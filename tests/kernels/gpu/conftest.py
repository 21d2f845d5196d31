"""Kernels run on the GPU where there is one, else under Triton's interpreter."""

import torch

if not torch.cuda.is_available():
    import interpreter

    interpreter.repair()
