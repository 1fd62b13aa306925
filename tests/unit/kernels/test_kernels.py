"""Every fast path against its float64 reference: value and every gradient, at odd sizes and ragged
segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.kernels.flora import materialised as flora_torch
from flora_train.kernels.flora.op import TORCH_FORMULATIONS, flora_linear
from flora_train.kernels.flora.reference import flora_reference
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.ia3.reference import ia3_reference
from flora_train.kernels.lora.batched import SegmentedLora
from flora_train.kernels.lora.looped import LoopedLora
from flora_train.kernels.lora.op import is_looped, lora_add
from flora_train.kernels.lora.reference import lora_reference
from flora_train.kernels.segments import Segments

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
RAGGED = (0, 7, 0, 1, 63, 130)
EVEN = (24, 24, 24, 24)
IN, OUT = 37, 53


def bounds(lengths: tuple[int, ...]) -> Segments:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return Segments(tuple(ends))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative root mean square error; NaN never passes a `<=`."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm()) if reference.double().norm() else float(difference)


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def check(
    fast: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    bar: float,
) -> None:
    """Compare outputs and the gradient of every input; the reference sees the same rounded numbers in
    float64."""
    rounded = {name: tensor.to(dtypes[name]) for name, tensor in inputs.items()}
    ours = {name: tensor.clone().requires_grad_() for name, tensor in rounded.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in rounded.items()}
    y, expected = fast(**ours), reference(**exact)
    upstream = random(*expected.shape, seed=99)
    y.backward(upstream.to(y.dtype))
    expected.backward(upstream.to(y.dtype).double())
    assert relative_error(y.detach(), expected.detach()) <= bar
    for name in inputs:
        gradient, exact_gradient = ours[name].grad, exact[name].grad
        assert gradient is not None, name
        assert exact_gradient is not None, name
        assert gradient.dtype == ours[name].dtype
        assert relative_error(gradient, exact_gradient) <= bar, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 16, 20])
@pytest.mark.parametrize("op", TORCH_FORMULATIONS.values(), ids=TORCH_FORMULATIONS)
@pytest.mark.parametrize("offsets", ["pure", "residual", "mixed"])
@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("threads", [1, 3])
def test_flora_equals_the_float64_reference_in_value_and_every_gradient(
    dtype: torch.dtype,
    rank: int,
    op: Any,
    offsets: str,
    lengths: tuple[int, ...],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(threads)
    monkeypatch.setattr(
        flora_torch, "BLOCK_BYTES", 20 * IN * dtype.itemsize
    )  # several blocks of output features
    segments = bounds(lengths)
    K = len(segments)
    offset = {"pure": [0.0] * K, "residual": [1.0] * K, "mixed": [float(k % 2) for k in range(K)]}[offsets]
    weight = random(OUT, IN, seed=0).to(dtype)
    master = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": random(segments.tokens, IN, seed=1),
        "A": random(K, rank, IN, seed=2),
        "B": random(K, OUT, rank, seed=3, scale=0.3),
    }
    for k in range(K):  # near the identity, where adapters begin; test_precision_far.py is about the rest
        if not offset[k]:
            inputs["A"][k, 0] = 1 + 0.1 * inputs["A"][k, 0]
            inputs["B"][k, :, 0] = 1 + inputs["B"][k, :, 0]
    check(
        lambda x, A, B: op.apply(x, weight, A, B, offset, segments, dtype == torch.bfloat16),
        lambda x, A, B: flora_reference(x, weight.double(), A, B, offset=offset, segments=segments),
        inputs,
        {"x": dtype, "A": master, "B": master},
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("one_scaling", [True, False])
@pytest.mark.parametrize("form", [SegmentedLora, LoopedLora], ids=["segmented", "looped"])
def test_lora_equals_the_float64_reference_in_value_and_every_gradient(
    dtype: torch.dtype, rank: int, lengths: tuple[int, ...], one_scaling: bool, form: Any
) -> None:
    segments = bounds(lengths)
    K = len(segments)
    scaling = [0.5 + k * (not one_scaling) for k in range(K)]
    master = torch.promote_types(dtype, torch.float32)
    inputs = {
        "y": random(segments.tokens, OUT, seed=0),
        "x": random(segments.tokens, IN, seed=1),
        "A": random(K, rank, IN, seed=2, scale=0.2),
        "B": random(K, OUT, rank, seed=3, scale=0.2),
    }
    check(
        lambda y, x, A, B: form.apply(y.clone(), x, A, B, scaling, segments),
        lambda y, x, A, B: lora_reference(y, x, A, B, scaling=scaling, segments=segments),
        inputs,
        {"y": dtype, "x": dtype, "A": master, "B": master},
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [(RAGGED, True), (EVEN, False), ((1, 2, 1), False), ((1,) * 129, False), ((64, 128), False)],
    ids=["ragged", "even", "few tokens", "short segments", "long units"],
)
def test_lora_is_computed_segment_by_segment_where_units_are_short_and_segments_long(
    lengths: tuple[int, ...], expected: bool
) -> None:
    assert is_looped(bounds(lengths)) is expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, EVEN], ids=["ragged", "even"])
def test_ia3_equals_the_float64_reference_in_value_and_every_gradient(
    dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    segments = bounds(lengths)
    inputs = {"x": random(segments.tokens, IN, seed=0), "scale": random(len(segments), IN, seed=1)}
    dtypes = {"x": dtype, "scale": torch.promote_types(dtype, torch.float32)}
    check(
        lambda x, scale: ia3_scale(x, scale, segments),
        lambda x, scale: ia3_reference(x, scale, segments),
        inputs,
        dtypes,
        TOLERANCE[dtype],
    )


def test_hand_written_gradients_pass_gradcheck() -> None:
    segments = bounds((2, 0, 3))
    x, weight = random(5, 4, seed=0).requires_grad_(), random(3, 4, seed=1)
    A, B = random(3, 2, 4, seed=2).requires_grad_(), random(3, 3, 2, seed=3).requires_grad_()
    for op in TORCH_FORMULATIONS.values():
        assert torch.autograd.gradcheck(
            lambda x, A, B, op=op: op.apply(x, weight, A, B, [0.0, 1.0, 1.0], segments, False), (x, A, B)
        )
    y = random(5, 3, seed=4).requires_grad_()
    for form in (SegmentedLora, LoopedLora):
        assert torch.autograd.gradcheck(
            lambda y, x, A, B, form=form: form.apply(y * 1.0, x, A, B, [1.0, 2.0, 0.5], segments),
            (y, x, A, B),
        )
    assert torch.autograd.gradcheck(
        lambda x, s: ia3_scale(x, s, segments), (x, random(3, 4, seed=5).requires_grad_())
    )


def test_tokens_of_other_segments_never_enter_an_adapter_s_output_or_gradient() -> None:
    segments = bounds((5, 6))
    x = random(11, IN, seed=0)
    x[5:] = float("nan")
    A, B = random(2, 3, IN, seed=1).requires_grad_(), random(2, OUT, 3, seed=2).requires_grad_()
    for op in TORCH_FORMULATIONS.values():
        y = op.apply(x, random(OUT, IN, seed=3), A, B, [1.0, 1.0], segments, False)
        dA, dB = torch.autograd.grad(y.sum(), (A, B))
        assert y[:5].isfinite().all()
        assert y[5:].isnan().all()
        assert dA[0].isfinite().all()
        assert dB[0].isfinite().all()
        assert dA[1].isnan().any()


def test_shapes_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match="A has shape"):
        flora_linear(
            random(4, IN, seed=0),
            random(OUT, IN, seed=1),
            random(2, 3, IN, seed=2),
            random(2, OUT, 3, seed=3),
            offset=[1.0],
            segments=bounds((4,)),
        )
    with pytest.raises(ValueError, match="bounds must rise"):
        Segments((0, 3, 2))


@pytest.mark.parametrize("op", ["ia3", "lora", *TORCH_FORMULATIONS])
def test_a_model_may_add_to_the_result_in_place(op: str) -> None:
    segments = bounds(EVEN)
    x, weight = random(segments.tokens, IN, seed=0).requires_grad_(), random(OUT, IN, seed=1)
    A, B = random(4, 2, IN, seed=2).requires_grad_(), random(4, OUT, 2, seed=3).requires_grad_()
    if op == "ia3":
        y = ia3_scale(x, A[:, 0], segments)
    elif op == "lora":
        y = lora_add(x @ weight.T, x, A, B, scaling=[1.0] * 4, segments=segments)
    else:
        y = TORCH_FORMULATIONS[op].apply(x, weight, A, B, [1.0] * 4, segments, False)
    y.view(2, -1, y.shape[1]).add_(1.0)
    y.sum().backward()
    assert x.grad is not None
