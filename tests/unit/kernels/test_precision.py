"""Modulations that half precision cannot represent beside 1, and the effect of autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.kernels.backend import splits, use_precision
from flora_train.kernels.flora.op import TORCH_FORMULATIONS, flora_linear
from flora_train.kernels.flora.reference import flora_reference
from flora_train.kernels.flora.triton_op import FusedFlora
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add
from flora_train.kernels.segments import Segments
from tests.triton_device import DEVICE

TOKENS, IN, OUT = 128, 64, 48
SEGMENTS = Segments((0, TOKENS // 2, TOKENS))


def near_identity(rank: int, offset: float, by: float = 1e-3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W0 in bfloat16 and A, B in float32 with a mean |M - 1| of about `by`."""
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A, B = random(2, rank, IN), by * random(2, OUT, rank) / rank**0.5
    if not offset:
        A[:, 0], B[:, :, 0] = 1 + by * A[:, 0], 1 + B[:, :, 0]
    return (
        random(TOKENS, IN).bfloat16().to(DEVICE),
        random(OUT, IN).bfloat16().to(DEVICE),
        A.to(DEVICE),
        B.to(DEVICE),
    )


def kept(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offset: float) -> float:
    """The share of the adapter's effect that y shows. y itself is rounded, which adds noise but takes nothing
    away."""
    base = x.double() @ weight.double().T
    effect = (
        flora_reference(
            x.double(), weight.double(), A.double(), B.double(), offset=[offset] * 2, segments=SEGMENTS
        )
        - base
    )
    return float(((y.detach().double() - base) * effect).sum() / effect.square().sum())


@pytest.mark.parametrize("name", [*TORCH_FORMULATIONS, "fused"])
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["pure", "residual"])
@pytest.mark.parametrize("by", [1e-4, 1e-3])
@pytest.mark.parametrize("rank", [1, 4])
def test_bfloat16_keeps_small_modulations_when_split_and_loses_them_otherwise(
    name: str, offset: float, rank: int, by: float
) -> None:
    op: Any = FusedFlora if name == "fused" else TORCH_FORMULATIONS[name]
    x, weight, A, B = near_identity(rank, offset, by)
    shares = {
        split: kept(op.apply(x, weight, A, B, [offset] * 2, SEGMENTS, split), x, weight, A, B, offset)
        for split in (True, False)
    }
    assert shares[True] == pytest.approx(1, abs=0.2)  # y rounded: noise
    assert abs(shares[False] - 1) > 0.25


def test_the_precision_is_one_choice_for_the_process() -> None:
    assert splits(torch.bfloat16)
    assert splits(torch.float16)
    assert not splits(torch.float32)
    try:
        use_precision("fused")
        assert not splits(torch.bfloat16)
    finally:
        use_precision("auto")
    assert splits(torch.bfloat16)


@pytest.mark.parametrize("rank", [1, 4])
def test_under_autocast_flora_computes_as_on_bfloat16_tensors(rank: int) -> None:
    x, weight, A, B = near_identity(rank, 1.0, by=0.3)
    dy = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(9)).to(DEVICE)

    def gradients(x: Tensor, weight: Tensor, autocast: bool) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            y = flora_linear(leaves[0], weight, leaves[1], leaves[2], offset=[1.0] * 2, segments=SEGMENTS)
            assert y.dtype == torch.bfloat16
            y.backward(dy.bfloat16())  # inside: a backward that autocast touches would differ
        return [y, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    for cast, plain in zip(
        gradients(x.float(), weight.float(), True), gradients(x, weight, False), strict=True
    ):
        assert torch.equal(cast.to(plain.dtype), plain)


def test_under_autocast_lora_and_ia3_take_what_the_base_layer_gives() -> None:
    x, weight, A, B = near_identity(4, 1.0, by=0.3)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = F.linear(x.float(), weight.float())
        assert y.dtype == torch.bfloat16
        lora = lora_add(y.clone(), x.float(), A, B, scaling=[1.0] * 2, segments=SEGMENTS)
        ia3 = ia3_scale(y, B[:, :, 0], SEGMENTS)
    assert torch.equal(lora, lora_add(y.clone(), x, A, B, scaling=[1.0] * 2, segments=SEGMENTS))
    assert torch.equal(ia3, ia3_scale(y, B[:, :, 0], SEGMENTS))
