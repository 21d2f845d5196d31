"""Where the kernels under test run."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
