"""The Triton kernels of IA3 against the float64 reference: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from flora_train.kernels.ia3.reference import ia3_reference
from flora_train.kernels.ia3.triton_kernels import FusedScale, ia3_op
from flora_train.kernels.triton_common import tile_table
from tests.triton_device import DEVICE, DTYPES, TOLERANCE, relative_error
from tests.unit.kernels.segmented import IN, LENGTHS, assert_close, exactly, random, segments_of

pytestmark = pytest.mark.usefixtures("memory_full_of_nan")


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


def test_the_op_keeps_its_contract_with_torch() -> None:
    segments = segments_of((3, 5))
    bounds, table = tile_table(segments, DEVICE)
    x, scale = random(8, IN, seed=0).requires_grad_(), random(2, IN, seed=1).requires_grad_()
    torch.library.opcheck(ia3_op, (x, scale, bounds, table, None))


@pytest.mark.filterwarnings("ignore:Input")  # not in double precision
def test_gradients_pass_gradcheck() -> None:
    """In float32: y is linear in each input, so that a wide step costs no accuracy."""
    segments = segments_of((2, 0, 3))
    x, scale = torch.rand(5, 3).to(DEVICE).requires_grad_(), torch.rand(3, 3).to(DEVICE).requires_grad_()
    # fast_mode checks along random directions.
    options = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda x, s: FusedScale.apply(x, s, segments), (x, scale), **options)
