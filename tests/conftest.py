"""Runs before any test module is imported."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter: read when Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
