"""The Triton kernels of fLoRA against the float64 reference: in Triton's interpreter, or on a GPU where there
is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flora_train.kernels.flora import triton_tiles as flora_tiles
from flora_train.kernels.flora.reference import flora_reference
from flora_train.kernels.flora.triton_op import FusedFlora, ScaledFlora, flora_op
from flora_train.kernels.flora.triton_tiles import can_use_tma, gradient_grid, gradient_tiles, tma_aligned
from flora_train.kernels.segments import Segments, per_segment
from flora_train.kernels.triton_common import TILE_TOKENS, tile_table
from tests.triton_device import DEVICE, DTYPES, TOLERANCE, relative_error

pytestmark = pytest.mark.usefixtures("memory_full_of_nan")
IN, OUT = 37, 71
RAGGED = (0, 7, 0, 1, 63, 128)
QUICK = [f"{rank}-ragged-dtype{i}" for rank in (1, 16, 20, 64) for i in range(3)] + [
    "1-one-dtype0",
    "20-one-dtype0",
    "64-one-dtype0",
]


def problem(
    rank: int, lengths: tuple[int, ...], dtype: torch.dtype, features: tuple[int, int] = (IN, OUT)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Segments]:
    """x, W0, A, B, segments."""
    generator = torch.Generator().manual_seed(rank)
    segments = Segments(tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    ins, outs = features
    x, weight = random(segments.tokens, ins).to(dtype), (random(outs, ins) / ins**0.5).to(dtype)
    A, B = random(len(segments), rank, ins), 0.3 * random(len(segments), outs, rank) / rank**0.5
    return x.requires_grad_(), weight, A.requires_grad_(), B.requires_grad_(), segments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [RAGGED, (24, 24), (1000,)], ids=["ragged", "even", "one"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 16, 20, 64])
@pytest.mark.quick(*QUICK)
def test_value_and_every_gradient(rank: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, A, B, segments = problem(rank, lengths, dtype)
    offset = [float(k % 2) for k in range(len(segments))]  # pure and residual adapters side by side
    check(FusedFlora.apply, offset, x, weight, A, B, segments, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pure_rank_one_between_two_scales(dtype: torch.dtype) -> None:
    x, weight, A, B, segments = problem(1, RAGGED, dtype)
    check(ScaledFlora.apply, [0.0] * len(segments), x, weight, A, B, segments, dtype, split=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize("lengths", [(7, 0, 64, 65), (300,)], ids=["ragged", "one"])
def test_tiles_that_tma_loads(rank: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows of whole 16 bytes, on a Hopper GPU. Tiles then also hold tokens of the next segment, which must
    have no effect."""
    x, weight, A, B, segments = problem(rank, lengths, dtype, features=(136, 72))
    if DEVICE.type == "cpu" or torch.cuda.get_device_capability() == (9, 0):
        assert can_use_tma(x, weight, None)
    offset = [float(k % 2) for k in range(len(segments))]
    check(FusedFlora.apply, offset, x, weight, A, B, segments, dtype)
    with torch.no_grad():
        A[-1], x[segments.bounds[-2] :] = math.nan, math.nan
    x.grad = A.grad = B.grad = None
    y = FusedFlora.apply(x, weight, A, B, offset, segments, True)
    y.backward(torch.ones_like(y))
    others = segments.bounds[-2]
    for clean in (y[:others], x.grad[:others], A.grad[:-1], B.grad[:-1]):  # type: ignore[index]
        assert clean.isfinite().all()


def test_tokens_that_begin_anywhere_in_memory() -> None:
    """TMA loads from addresses that are multiples of 16 bytes."""
    x, weight, A, B, segments = problem(2, (5, 11), torch.float16, features=(24, 16))
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    elsewhere = buffer[1:].view_as(x).copy_(x.detach()).requires_grad_()
    assert not tma_aligned(elsewhere)
    check(FusedFlora.apply, [1.0, 0.0], elsewhere, weight, A, B, segments, torch.float16)


def check(
    op: Callable[..., Tensor],
    offset: list[float],
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    segments: Segments,
    dtype: torch.dtype,
    split: bool | None = None,
) -> None:
    """Output and every gradient against the float64 reference."""
    dy = torch.randn(segments.tokens, len(weight), generator=torch.Generator().manual_seed(1)).to(
        DEVICE, dtype
    )
    y = op(x, weight, A, B, offset, segments, dtype != torch.float32 if split is None else split)
    y.backward(dy)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, A, B)]
    reference = flora_reference(
        exact[0], weight.double(), exact[1], exact[2], offset=offset, segments=segments
    )
    reference.backward(dy.double())
    assert relative_error(y, reference) <= TOLERANCE[dtype]
    for mine, theirs in zip((x, A, B), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert relative_error(mine.grad, theirs.grad) <= TOLERANCE[dtype]


def test_the_table_has_a_length_that_the_lengths_of_segments_do_not_change() -> None:
    tables = [
        tile_table(Segments(bounds), torch.device("cpu"))[1]
        for bounds in ((0, 0, 300), (0, 150, 300), (0, 1, 300))
    ]
    assert {len(table) for table in tables} == {300 // TILE_TOKENS + 2}
    for table in tables:
        taken = [(first, min(first + TILE_TOKENS, end)) for k, first, end in table.tolist() if k >= 0]
        assert [token for span in taken for token in range(*span)] == list(range(300))


def test_half_precision_keeps_modulations_that_its_own_rounding_would_lose() -> None:
    x, weight, A, B, segments = problem(4, (512,), torch.float16)
    exact = [tensor.detach().double() for tensor in (x, weight, A, B * 1e-4)]
    reference, base = flora_reference(*exact, offset=[1.0], segments=segments), exact[0] @ exact[1].T
    effect = reference - base

    def kept(y: Tensor) -> float:
        """The share of the adapter's effect that y shows: rounding y itself adds noise, but takes nothing
        away."""
        return float(((y.detach().double() - base) * effect).sum() / effect.square().sum())

    modulated = (exact[1] * (1 + exact[3][0] @ exact[2][0])).to(weight.dtype)
    assert kept(exact[0] @ modulated.double().T) < 0.3
    assert kept(FusedFlora.apply(x, weight, A, B * 1e-4, [1.0], segments, True)) == pytest.approx(1, abs=0.15)


def test_the_op_keeps_its_contract_with_torch() -> None:
    x, weight, A, B, segments = problem(2, (3, 5), torch.float32)
    bounds, table = tile_table(segments, x.device)
    shift = per_segment([0.0, 1.0], A).view(-1)
    torch.library.opcheck(flora_op, (x, weight, A, B, shift, bounds, table, None, TILE_TOKENS, False, False))


@pytest.mark.filterwarnings("ignore:Input")  # not in double precision
@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_pass_gradcheck(rank: int) -> None:
    """In float32: y is linear in each of x, A and B, so that a wide step costs no accuracy. Along random
    directions, all numbers at once."""
    segments = Segments((0, 2, 2, 5))
    x, weight, A, B = (
        torch.rand(*shape).to(DEVICE) for shape in ((5, 3), (4, 3), (3, rank, 3), (3, 4, rank))
    )
    inputs = tuple(tensor.requires_grad_() for tensor in (x, A, B))
    options = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3, "nondet_tol": 0.0, "fast_mode": True}
    for offset in ([0.0] * 3, [1.0, 0.0, 1.0]):
        assert torch.autograd.gradcheck(
            lambda x, A, B, o=offset: FusedFlora.apply(x, weight, A, B, o, segments, False), inputs, **options
        )
    if rank == 1:
        assert torch.autograd.gradcheck(
            lambda x, A, B: ScaledFlora.apply(x, weight, A, B, [0.0] * 3, segments, False), inputs, **options
        )


def test_the_op_compiles_into_one_graph() -> None:
    x, weight, A, B, segments = problem(2, (3, 5), torch.float32)
    bounds, table = tile_table(segments, x.device)
    shift = per_segment([0.0, 1.0], A).view(-1)

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.relu(
            flora_op(x * 2.0, weight, A, B, shift, bounds, table, None, TILE_TOKENS, False, False)
        )

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = run(x, A, B)
        results.append([y, *torch.autograd.grad(y.sum(), (x, A, B))])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("rank", [3, 20])
def test_a_program_may_take_any_number_of_tiles(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large layer of many adapters every program sums over rows and columns of tiles."""
    generator = torch.Generator().manual_seed(rank)
    segments = Segments((0, 5, 5, 40))
    shapes = ((40, 300), (70, 300), (3, rank, 300), (3, 70, rank))
    x, weight, A, B = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    weight /= 17.0
    cut = {}
    for enough in (1, 10_000):
        monkeypatch.setattr(flora_tiles, "MIN_PROGRAMS", enough)
        tiles = gradient_tiles(x.dtype, rank, tokens_per_adapter=25, uses_tma=False)
        rows, columns = -(-70 // tiles.outs), -(-300 // tiles.ins)
        cut[enough] = gradient_grid(3, rows, columns)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        check(FusedFlora.apply, [1.0, 0.0, 1.0], leaves[0], weight, *leaves[1:], segments, torch.float32)
    assert cut[1][0] == 1 < cut[1][1] < columns  # several launches add up
    assert cut[10_000] == (rows, columns)
