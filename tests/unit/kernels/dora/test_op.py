"""DoRA against its float64 reference, and against PEFT's own layer, in value and every gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flora_train.adapters.methods import Site
from flora_train.adapters.methods.dora import Dora
from flora_train.kernels.dora.op import adapted_norms, dora_add
from flora_train.kernels.dora.reference import dora_reference
from flora_train.kernels.segments import Segments
from tests.conftest import spec
from tests.triton_device import DTYPES, TOLERANCE, relative_error
from tests.unit.kernels.segmented import IN, LENGTHS, OUT, assert_close, exactly, random, segments_of


def fast(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: list[float],
    segments: Segments,
) -> Tensor:
    norms = adapted_norms(weight, A, B, scaling)
    return dora_add(F.linear(x, weight), x, A, B, magnitude, norms=norms, scaling=scaling, segments=segments)


@pytest.mark.parametrize("dtype", DTYPES)
@LENGTHS
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_value_and_every_gradient_are_those_of_the_reference(
    rank: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    segments = segments_of(lengths)
    K = len(segments)
    scaling = [0.5 + k for k in range(K)]
    weight, x = (
        random(OUT, IN, seed=0, dtype=dtype, scale=0.2),
        random(segments.tokens, IN, seed=1, dtype=dtype),
    )
    A, B = random(K, rank, IN, seed=2, scale=0.2), random(K, OUT, rank, seed=3, scale=0.2)
    magnitude = random(K, OUT, seed=4).abs() + 0.5
    mine = tuple(tensor.requires_grad_() for tensor in (x, A, B, magnitude))
    ours = fast(x, weight, A, B, magnitude, scaling, segments)
    dy = random(segments.tokens, OUT, seed=5, dtype=dtype)
    ours.backward(dy)
    exact = exactly(*mine)
    x64, A64, B64, m64 = exact
    reference = dora_reference(x64, weight.double(), A64, B64, m64, scaling=scaling, segments=segments)
    reference.backward(dy.double())
    assert relative_error(ours, reference) <= TOLERANCE[dtype]
    assert_close(mine, exact, dtype)


def test_the_reference_passes_gradcheck_in_all_but_the_norm() -> None:
    """The norm is a constant for the gradient: gradcheck holds for x and the magnitude."""
    segments = segments_of((2, 3))
    x, magnitude = (random(*shape, seed=9, dtype=torch.float64) for shape in ((5, 4), (2, 6)))
    weight, A, B = (random(*s, seed=8, dtype=torch.float64) for s in ((6, 4), (2, 2, 4), (2, 6, 2)))

    def computed(x: Tensor, magnitude: Tensor) -> Tensor:
        return dora_reference(x, weight, A, B, magnitude, scaling=[0.5, 2.0], segments=segments)

    assert torch.autograd.gradcheck(computed, (x.requires_grad_(), magnitude.requires_grad_()))


def test_norms_are_those_of_the_formed_weights_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, A, B = random(OUT, IN, seed=0), random(3, 5, IN, seed=1), random(3, OUT, 5, seed=2)
    scaling = [0.1, 1.0, 3.0]
    expected = torch.stack(
        [
            (weight.double() + s * (b.double() @ a.double())).norm(dim=1)
            for s, a, b in zip(scaling, A, B, strict=True)
        ]
    )
    monkeypatch.setattr("flora_train.kernels.dora.op.MOST_WIDE", 4 * IN)
    torch.testing.assert_close(adapted_norms(weight, A, B, scaling).double(), expected, rtol=1e-5, atol=1e-6)
    half = adapted_norms(weight.bfloat16(), A, B, scaling)
    assert half.dtype == torch.float32


def test_the_layer_with_dropout_is_the_reference() -> None:
    segments = segments_of((4, 3))
    base = nn.Linear(IN, OUT)
    x, mask = random(7, IN, seed=0), (random(7, IN, seed=1) > 0.3) / 0.6
    params = {
        "A": random(2, 3, IN, seed=2, scale=0.2).requires_grad_(),
        "B": random(2, OUT, 3, seed=3, scale=0.2).requires_grad_(),
        "m": (random(2, OUT, seed=4).abs() + 0.5).requires_grad_(),
    }
    site = Site(base, lambda: nullcontext(base.weight), base.bias, lambda x: x * mask)
    specs = [spec("dora", alpha=4.0, rank=2), spec("dora", alpha=1.0, rank=2)]
    ours = Dora().forward(x, site, params, specs=specs, feedforward=False, segments=segments)
    exact = exactly(*params.values())
    expected = dora_reference(
        x.double(),
        base.weight.double(),
        *exact,
        scaling=[2.0, 0.5],
        segments=segments,
        dropped=(x * mask).double(),
    )
    dy = random(7, OUT, seed=5)
    ours.backward(dy)
    expected.backward(dy.double())
    assert relative_error(ours, expected + base.bias.double()) <= TOLERANCE[torch.float32]
    assert_close(tuple(params.values()), exact, torch.float32)


@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_reference_is_peft_s_own_layer(kind: str, dropout: float) -> None:
    torch.manual_seed(3)
    base: nn.Module = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=kind == "linear")
    base.requires_grad_(False)
    config = LoraConfig(
        r=3, lora_alpha=6, use_dora=True, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d"
    )
    layer = PeftLinear(
        base, "default", config=config, r=3, lora_alpha=6, fan_in_fan_out=kind == "conv1d"
    ).double()
    weight: Tensor = base.weight.T if kind == "conv1d" else base.weight  # type: ignore[union-attr, assignment]
    parameters = (
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    )
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    masks: list[Tensor] = []
    layer.lora_dropout["default"].register_forward_hook(lambda m, args, out: masks.append(out / args[0]))
    theirs = layer.train()(x)
    dy = torch.randn_like(theirs)
    expected = torch.autograd.grad(theirs, (x, *parameters), dy)
    mask = masks[0].detach() if masks else torch.ones_like(x)
    ours = dora_reference(
        x,
        weight,
        *(parameter[None] for parameter in parameters),
        scaling=[2.0],
        segments=Segments((0, 6)),
        dropped=x * mask,
    )
    if base.bias is not None:
        ours = ours + base.bias  # type: ignore[operator]
    torch.testing.assert_close(ours, theirs)
    for gradient, reference in zip(torch.autograd.grad(ours, (x, *parameters), dy), expected, strict=True):
        torch.testing.assert_close(gradient, reference)
