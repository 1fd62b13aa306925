"""The Triton kernels of LoRA against the float64 reference: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.lora.reference import lora_reference
from flora_train.kernels.lora.triton_kernels import FusedLora, lora_backward_op
from flora_train.kernels.segments import per_segment
from flora_train.kernels.triton_common import tile_table
from tests.triton_device import DEVICE, DTYPES, TOLERANCE, relative_error
from tests.unit.kernels.segmented import IN, LENGTHS, OUT, assert_close, exactly, random, segments_of

pytestmark = pytest.mark.usefixtures("memory_full_of_nan")
QUICK = [f"{rank}-ragged-dtype{i}" for rank in (1, 16, 20, 64) for i in range(3)] + [
    "1-one-dtype0",
    "20-one-dtype0",
    "64-one-dtype0",
]


@pytest.mark.parametrize("dtype", DTYPES)
@LENGTHS
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 16, 20, 64])
@pytest.mark.quick(*QUICK)
def test_lora_in_value_and_every_gradient(rank: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    segments = segments_of(lengths)
    K = len(segments)
    scaling = [0.5 + k for k in range(K)]
    y, x = random(segments.tokens, OUT, seed=0, dtype=dtype), random(segments.tokens, IN, seed=1, dtype=dtype)
    A, B = random(K, rank, IN, seed=2, scale=0.2), random(K, OUT, rank, seed=3, scale=0.2)
    dy = random(segments.tokens, OUT, seed=4, dtype=dtype)
    mine = tuple(tensor.requires_grad_() for tensor in (y, x, A, B))
    ours = FusedLora.apply(y * 1.0, x, A, B, scaling, segments)
    ours.backward(dy)
    exact = exactly(*mine)
    reference = lora_reference(*exact, scaling=scaling, segments=segments)
    reference.backward(dy.double())
    assert relative_error(ours, reference) <= TOLERANCE[dtype]
    assert_close(mine, exact, dtype)


def test_lora_writes_into_the_base_output() -> None:
    segments = segments_of((3, 5))
    y, x = random(8, OUT, seed=0), random(8, IN, seed=1)
    result = FusedLora.apply(y, x, random(2, 4, IN, seed=2), random(2, OUT, 4, seed=3), [1.0, 1.0], segments)
    assert result.data_ptr() == y.data_ptr()


def test_the_ops_keep_their_contract_with_torch() -> None:
    segments = segments_of((3, 5))
    bounds, table = tile_table(segments, DEVICE)
    x, A, B = random(8, IN, seed=0), random(2, 3, IN, seed=2), random(2, OUT, 3, seed=3)
    scaling = per_segment([0.5, 2.0], A).view(-1)
    torch.library.opcheck(
        torch.ops.flora_train.lora_add, (random(8, OUT, seed=4), x, A, B, scaling, table, None)
    )
    dy, hidden = random(8, OUT, seed=5), random(8, 3, seed=6)
    torch.library.opcheck(lora_backward_op, (dy, x, hidden, A, B, scaling, bounds, table, None))


@pytest.mark.usefixtures("triton_backend")
def test_base_output_that_is_not_contiguous_is_added_to() -> None:
    segments = segments_of((3, 5))
    y, x, A, B = (
        random(OUT, 8, seed=0).T,
        random(8, IN, seed=1),
        random(2, 3, IN, seed=2),
        random(2, OUT, 3, seed=3),
    )
    expected = lora_reference(
        *(tensor.double() for tensor in (y, x, A, B)), scaling=[1.0, 2.0], segments=segments
    )
    assert (
        relative_error(lora_add(y, x, A, B, scaling=[1.0, 2.0], segments=segments), expected)
        <= TOLERANCE[torch.float32]
    )


@pytest.mark.filterwarnings("ignore:Input")  # not in double precision
def test_gradients_pass_gradcheck() -> None:
    """In float32: y is linear in each input, so that a wide step costs no accuracy."""
    segments = segments_of((2, 0, 3))
    y, x, A, B = (
        torch.rand(*shape).to(DEVICE).requires_grad_() for shape in ((5, 4), (5, 3), (3, 2, 3), (3, 4, 2))
    )
    # fast_mode checks along random directions.
    options = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3, "fast_mode": True}
    scaling = [1.0, 2.0, 0.5]
    assert torch.autograd.gradcheck(
        lambda y, x, A, B: FusedLora.apply(y * 1.0, x, A, B, scaling, segments), (y, x, A, B), **options
    )
