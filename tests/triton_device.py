"""The device of Triton kernels in the tests: a GPU, or Triton's interpreter.

tests/conftest.py imports this before Triton, which reads the variable when it is loaded.
"""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import bfloat16_interpreter

    bfloat16_interpreter.install()

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative root mean square error; NaN never passes a `<=`."""
    return float((value.detach().double() - reference.detach()).norm() / reference.detach().norm())
