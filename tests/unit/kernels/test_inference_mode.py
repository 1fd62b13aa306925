"""What the kernels keep between calls serves training steps after a call in inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flora_train.kernels.backend import splits, use_backend
from flora_train.kernels.cpu_threads import SCRATCH
from flora_train.kernels.flora.op import TORCH_FORMULATIONS
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.segments import Segments
from tests.triton_device import DEVICE
from tests.unit.kernels.segmented import random

IN, OUT, RANK = 29, 31, 3
Forward = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
WEIGHT = random(OUT, IN, seed=3)


def flora(formulation: str) -> Forward:
    function = TORCH_FORMULATIONS[formulation]  # type: ignore[index]
    return lambda x, A, B, segments: function.apply(
        x, WEIGHT, A, B, [0.0, 1.0, 1.0][: len(segments)], segments, splits(x.dtype)
    )


FORWARDS: dict[str, Forward] = {
    **{name: flora(name) for name in TORCH_FORMULATIONS},
    "lora": lambda x, A, B, segments: lora_add(
        x @ WEIGHT.T, x, A, B, scaling=[1.0, 0.5, 2.0][: len(segments)], segments=segments
    ),
    "ia3": lambda x, A, B, segments: ia3_scale(x @ WEIGHT.T, B[:, :, 0], segments),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", FORWARDS)
def test_a_call_in_inference_mode_leaves_training_possible(name: str, backend: str) -> None:
    offset = 1 + 7 * list(FORWARDS).index(name) + 70 * (backend == "triton")  # segments of this case alone
    segments = Segments((0, 5, 5 + offset, 23 + 2 * offset))
    use_backend(backend, DEVICE)  # type: ignore[arg-type]
    SCRATCH.buffers.clear()
    x, A, B = random(segments.tokens, IN, seed=2), random(3, RANK, IN, seed=6), random(3, OUT, RANK, seed=7)
    with torch.inference_mode():
        expected = FORWARDS[name](x, A, B, segments).clone()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    y = FORWARDS[name](*leaves, segments)  # type: ignore[call-arg, arg-type]
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected)
    assert leaves[0].grad is not None
    use_backend("auto", DEVICE)


@pytest.mark.parametrize("name", FORWARDS)
def test_threads_write_to_the_tensors_of_inference_mode(name: str) -> None:
    segments = Segments((0, 40, 97 + list(FORWARDS).index(name)))  # segments of this case alone
    x, A, B = random(segments.tokens, IN, seed=2), random(2, RANK, IN, seed=6), random(2, OUT, RANK, seed=7)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            y = FORWARDS[name](x, A, B, segments)
        torch.testing.assert_close(y, FORWARDS[name](x, A, B, segments))
    finally:
        torch.set_num_threads(threads)
