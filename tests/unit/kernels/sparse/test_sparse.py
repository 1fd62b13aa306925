"""Both forms of sparse changes against the float64 reference, in value and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flora_train.kernels.segments import Segments
from flora_train.kernels.sparse import gathered
from flora_train.kernels.sparse.dense import DenseSparse
from flora_train.kernels.sparse.gathered import GatheredSparse
from flora_train.kernels.sparse.op import sparse_add
from flora_train.kernels.sparse.reference import sparse_reference
from tests.triton_device import DEVICE, TOLERANCE, relative_error
from tests.unit.kernels.segmented import IN, LENGTHS, OUT, assert_close, exactly, random, segments_of

pytestmark = pytest.mark.usefixtures("memory_full_of_nan")
FORMS = pytest.mark.parametrize("form", [DenseSparse, GatheredSparse])


def indices_of(count: int, outputs: int = OUT, inputs: int = IN) -> Tensor:
    chosen = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(9))[:count]
    return chosen.sort().values.to(DEVICE)


@FORMS
@LENGTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 40, OUT * IN])
def test_sparse_in_value_and_every_gradient(
    form: Any, lengths: tuple[int, ...], dtype: torch.dtype, count: int
) -> None:
    segments, indices = segments_of(lengths), indices_of(count)
    y, x = random(segments.tokens, OUT, seed=0, dtype=dtype), random(segments.tokens, IN, seed=1, dtype=dtype)
    values = random(len(segments), count, seed=2, scale=0.5)
    dy = random(segments.tokens, OUT, seed=4, dtype=dtype)
    mine = tuple(tensor.requires_grad_() for tensor in (y, x, values))
    ours = form.apply(y * 1.0, x, values, indices, segments)
    ours.backward(dy)
    exact = exactly(*mine)
    reference = sparse_reference(*exact, indices, segments=segments)
    reference.backward(dy.double())
    assert relative_error(ours, reference) <= TOLERANCE[dtype]
    assert_close(mine, exact, dtype)


@FORMS
def test_gradients_pass_gradcheck_in_float64(form: Any) -> None:
    segments, indices = Segments((0, 2, 2, 5)), indices_of(6, 4, 3)
    generator = torch.Generator().manual_seed(0)
    y, x, values = (
        torch.rand(*shape, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
        for shape in ((5, 4), (5, 3), (3, 6))
    )
    assert torch.autograd.gradcheck(
        lambda y, x, values: form.apply(y * 1.0, x, values, indices, segments), (y, x, values)
    )


def test_blocks_of_the_mask_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    segments, indices = segments_of((3, 5)), indices_of(50)
    y, x = random(8, OUT, seed=0), random(8, IN, seed=1)
    values = random(2, 50, seed=2)
    gradients = []
    for numbers in (2**20, 8 * 7):
        monkeypatch.setattr(gathered, "BLOCK_NUMBERS", numbers)
        mine = tuple(tensor.clone().requires_grad_() for tensor in (x, values))
        result = GatheredSparse.apply(y * 1.0, *mine, indices, segments)
        result.square().sum().backward()
        gradients.append([result, *(tensor.grad for tensor in mine)])
    for whole, blocks in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [40, OUT * IN])
def test_a_nan_of_one_adapter_changes_no_bit_of_the_others(count: int) -> None:
    segments, indices = segments_of((3, 4, 5)), indices_of(count)
    x, dy = random(12, IN, seed=1), random(12, OUT, seed=3)
    results = []
    for poison in (1.0, float("nan")):
        values = random(3, count, seed=2)
        values[1] *= poison
        values.requires_grad_()
        tokens = x.clone().requires_grad_()
        y = sparse_add(torch.zeros(12, OUT, device=DEVICE), tokens, values, indices, segments=segments)
        y.backward(dy)
        assert tokens.grad is not None
        assert values.grad is not None
        others = [rows[[0, 1, 2, 7, 8, 9, 10, 11]] for rows in (y.detach(), tokens.grad)]
        results.append([*others, values.grad[[0, 2]]])
    for healthy, poisoned in zip(*results, strict=True):
        assert torch.equal(healthy, poisoned)


@FORMS
def test_no_dense_change_is_kept_for_each_adapter(form: Any) -> None:
    """For 16 adapters no tensor has more numbers than two weights, forward and backward."""
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    segments, indices = segments_of((2,) * 16), indices_of(30)
    x, values = random(32, IN, seed=1).requires_grad_(), random(16, 30, seed=2).requires_grad_()
    with Sizes():
        form.apply(torch.zeros(32, OUT, device=DEVICE), x, values, indices, segments).sum().backward()
    assert len(sizes) > 10
    assert max(sizes) <= 2 * OUT * IN


def test_shapes_that_do_not_agree_are_refused() -> None:
    segments, indices = segments_of((3,)), indices_of(5)
    with pytest.raises(ValueError, match="values has shape"):
        sparse_add(torch.zeros(3, OUT), torch.zeros(3, IN), torch.zeros(1, 4), indices, segments=segments)
    with pytest.raises(ValueError, match="x has shape"):
        sparse_add(torch.zeros(3, OUT), torch.zeros(4, IN), torch.zeros(1, 5), indices, segments=segments)
