"""The Triton kernels of LoRA and IA3 against the float64 references: in Triton's interpreter, or on a GPU
where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flora_train.kernels.ia3.reference import ia3_reference
from flora_train.kernels.ia3.triton_kernels import FusedScale, ia3_op
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.lora.reference import lora_reference
from flora_train.kernels.lora.triton_kernels import FusedLora, lora_backward_op
from flora_train.kernels.segments import Segments, per_segment
from flora_train.kernels.triton_common import tile_table
from tests.triton_device import DEVICE, DTYPES, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("memory_full_of_nan")
IN, OUT = 37, 71
LENGTHS = pytest.mark.parametrize("lengths", [(0, 7, 0, 1, 63, 128), (24, 24), (1000,)], ids=["ragged", "even", "one"])
QUICK = [f"{rank}-ragged-dtype{i}" for rank in (1, 16, 20, 64) for i in range(3)] + [
    "1-one-dtype0",
    "20-one-dtype0",
    "64-one-dtype0",
]


def segments_of(lengths: tuple[int, ...]) -> Segments:
    return Segments(tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def exactly(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_close(mine: tuple[Tensor, ...], exact: list[Tensor], dtype: torch.dtype) -> None:
    for tensor, reference in zip(mine, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad, reference.grad) <= TOLERANCE[dtype]


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


@pytest.mark.parametrize("dtype", DTYPES)
@LENGTHS
def test_ia3_in_value_and_every_gradient(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    segments = segments_of(lengths)
    x, scale = random(segments.tokens, IN, seed=0, dtype=dtype), random(len(segments), IN, seed=1)
    dy = random(segments.tokens, IN, seed=2, dtype=dtype)
    mine = (x.requires_grad_(), scale.requires_grad_())
    ours = FusedScale.apply(x, scale, segments)
    ours.backward(dy)
    exact = exactly(*mine)
    reference = ia3_reference(*exact, segments)
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
    x, scale = random(8, IN, seed=0).requires_grad_(), random(2, IN, seed=1).requires_grad_()
    torch.library.opcheck(ia3_op, (x, scale, bounds, table, None))
    A, B = random(2, 3, IN, seed=2), random(2, OUT, 3, seed=3)
    scaling = per_segment([0.5, 2.0], A).view(-1)
    x = x.detach()
    torch.library.opcheck(torch.ops.flora_train.lora_add, (random(8, OUT, seed=4), x, A, B, scaling, table, None))
    dy, hidden = random(8, OUT, seed=5), random(8, 3, seed=6)
    torch.library.opcheck(lora_backward_op, (dy, x, hidden, A, B, scaling, bounds, table, None))


@pytest.mark.usefixtures("triton_backend")
def test_a_base_output_that_lies_across_memory_is_added_to_all_the_same() -> None:
    segments = segments_of((3, 5))
    y, x, A, B = random(OUT, 8, seed=0).T, random(8, IN, seed=1), random(2, 3, IN, seed=2), random(2, OUT, 3, seed=3)
    expected = lora_reference(*(tensor.double() for tensor in (y, x, A, B)), scaling=[1.0, 2.0], segments=segments)
    assert relative_error(lora_add(y, x, A, B, scaling=[1.0, 2.0], segments=segments), expected) <= TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:Input")  # not in double precision
def test_gradients_pass_gradcheck() -> None:
    """In float32: y is linear in each input, so that a wide step costs no accuracy. Along random directions,
    all numbers at once."""
    segments = segments_of((2, 0, 3))
    y, x, A, B = (torch.rand(*shape).to(DEVICE).requires_grad_() for shape in ((5, 4), (5, 3), (3, 2, 3), (3, 4, 2)))
    options = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3, "fast_mode": True}
    scaling = [1.0, 2.0, 0.5]
    assert torch.autograd.gradcheck(
        lambda y, x, A, B: FusedLora.apply(y * 1.0, x, A, B, scaling, segments), (y, x, A, B), **options
    )
    assert torch.autograd.gradcheck(
        lambda x, s: FusedScale.apply(x, s, segments), (x, torch.rand(3, 3).to(DEVICE).requires_grad_()), **options
    )
