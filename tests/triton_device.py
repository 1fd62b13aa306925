"""Where do the tests run Triton kernels? On a GPU, or in Triton's interpreter. tests/conftest.py imports this before
anything that may load Triton, which looks at the variable while it loads."""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
