"""A layer for a batch of fLoRA, IA3 and base tokens equals each token's own weight, computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flora_train.serving import layer_plan
from flora_train.serving.batch_rows import BatchRows
from flora_train.serving.layer_plan import SlotUse, forms_weight
from flora_train.serving.projection import LayerFactors, project

RANK = 6
INPUTS = 24


@dataclass
class Layer:
    weight: Tensor
    bias: Tensor | None
    factors: LayerFactors
    sizes: list[int]

    def weight_of(self, slot: int) -> tuple[Tensor, Tensor | None]:
        """The adapted weight and bias."""
        use = self.factors.uses.get(slot)
        if use is None:
            return self.weight, self.bias
        parts = []
        bias = None if self.bias is None else list(self.bias.clone().split(self.sizes))
        for s, W in enumerate(self.weight.split(self.sizes)):
            A, B = self.factors.A[s][slot], self.factors.B[s][slot]
            if use.scales[s] == "input":
                parts.append(W * (1 + A[0]))
            elif use.scales[s] == "output":
                parts.append(W * (1 + B[0])[:, None])
                if bias is not None:
                    bias[s] *= 1 + B[0]
            else:
                r = use.ranks[s]
                parts.append(W * (float(use.keep_base[s]) + B[:r].T @ A[:r]))
        return torch.cat(parts), None if bias is None else torch.cat(bias)


def make_layer(sizes: list[int], *, bias: bool, dtype: torch.dtype = torch.float64) -> Layer:
    """Slots 0, 1: residual fLoRA of ranks 4 and 1; 2: pure; 3: IA3 of inputs; 4: IA3 of outputs; 5: a fLoRA
    that adapts the last slice only; 6: none on this layer; 7: another rank on every slice; 8: an IA3
    of outputs, inputs and nothing."""
    torch.manual_seed(0)
    n = len(sizes)
    A = [torch.randn(9, RANK, INPUTS, dtype=dtype) for _ in sizes]
    B = [torch.randn(9, RANK, size, dtype=dtype) for size in sizes]
    keep = (True,) * n
    last = (0,) * (n - 1) + (3,)
    for slots, use_ranks in (((0,), (4,) * n), ((1,), (1,) * n), ((2,), (3,) * n), ((5,), last)):
        for slot in slots:
            for s, rank in enumerate(use_ranks):
                A[s][slot, rank:] = 0
                B[s][slot, rank:] = 0
    flora = ("",) * n
    uses = {
        0: SlotUse((4,) * n, keep, flora),
        1: SlotUse((1,) * n, keep, flora),
        2: SlotUse((3,) * n, (False,) * n, flora),
        3: SlotUse((1,) * n, keep, ("input",) * n),
        4: SlotUse((1,) * n, keep, ("output",) * n),
        5: SlotUse(last, keep, flora),
        7: SlotUse(tuple(range(1, n + 1)), keep, flora),
        8: SlotUse((1, 1, 0)[:n], keep, ("output", "input", "")[:n]),
    }
    weight = torch.randn(sum(sizes), INPUTS, dtype=dtype)
    return Layer(
        weight, torch.randn(sum(sizes), dtype=dtype) if bias else None, LayerFactors(A, B, uses), sizes
    )


def run(layer: Layer, x: Tensor, slot_of: list[int]) -> tuple[Tensor, list[int]]:
    """The layer's result, and the numbers of rows of each product with the whole weight."""
    tokens_of = {
        slot: tuple(i for i, s in enumerate(slot_of) if s == slot) for slot in sorted({*slot_of} - {-1})
    }
    counts = []

    def product(tokens: Tensor, s: int | None) -> Tensor:
        counts.append(len(tokens))
        return tokens @ (layer.weight if s is None else layer.weight.split(layer.sizes)[s]).T

    rows = BatchRows(tokens_of, False, x.device)
    y = project(x, layer.factors, rows, product=product, weight=lambda: layer.weight, bias=layer.bias)
    again = project(x, layer.factors, rows, product=product, weight=lambda: layer.weight, bias=layer.bias)
    assert torch.equal(y, again)
    return y, counts


def expected(layer: Layer, x: Tensor, slot_of: list[int]) -> Tensor:
    rows = []
    for token, slot in zip(x, slot_of, strict=True):
        weight, bias = layer.weight_of(slot)
        rows.append(weight @ token + (0 if bias is None else bias))
    return torch.stack(rows)


MIXES = {
    "decoding": [0, 1, 2, 3, 4, 5, 6, 7, -1, 8],
    "one adapter": [0, 0],
    "base and one": [-1, 0, -1, 0, 0],
    "IA3 only": [3, 4, 3, -1, 8],
    "not adapted": [6, 6, -1],
    "interleaved": [0, 2, 0, 2, 7, 1, 0],
    "prefill": [0] * 60 + [2] * 70 + [-1] * 5 + [4] * 9 + [7] * 80 + [3] * 40 + [1] * 200 + [5] * 64,
    "prefill of one": [2] * 90,
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("sizes", [[20], [16, 8, 8], [12, 12]], ids=["single", "qkv", "gate-up"])
@pytest.mark.parametrize("mix", MIXES)
def test_every_token_gets_its_own_adapter(mix: str, sizes: list[int], bias: bool) -> None:
    layer = make_layer(sizes, bias=bias)
    x = torch.randn(len(MIXES[mix]), INPUTS, dtype=torch.float64)
    y, _ = run(layer, x, MIXES[mix])
    torch.testing.assert_close(y, expected(layer, x, MIXES[mix]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [False, True], ids=["expanded", "formed"])
def test_both_ways_give_the_same(form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_plan, "forms_weight", lambda *_, **__: form)
    for sizes in ([20], [16, 8, 8]):
        layer = make_layer(sizes, bias=True)
        x = torch.randn(len(MIXES["interleaved"]), INPUTS, dtype=torch.float64)
        y, _ = run(layer, x, MIXES["interleaved"])
        torch.testing.assert_close(y, expected(layer, x, MIXES["interleaved"]), rtol=1e-10, atol=1e-10)


def test_base_and_ranks_are_one_product() -> None:
    layer = make_layer([20], bias=False)
    slot_of = [0, 1, -1]
    _, counts = run(layer, torch.randn(3, INPUTS, dtype=torch.float64), slot_of)
    assert counts == [3 + 4 + 1] * 2
    _, counts = run(
        layer, torch.randn(3, INPUTS, dtype=torch.float64), [2, 2, -1]
    )  # pure: no row of the base
    assert counts == [1 + 3 + 3] * 2
    _, counts = run(layer, torch.randn(2, INPUTS, dtype=torch.float64), [3, 4])
    assert counts == [2, 2]


def test_a_slot_may_change_while_the_batch_stays() -> None:
    layer = make_layer([16, 8, 8], bias=True)
    x, slot_of = torch.randn(2, INPUTS, dtype=torch.float64), [0, 1]
    rows = BatchRows({0: (0,), 1: (1,)}, False, x.device)

    def result() -> Tensor:
        return project(
            x,
            layer.factors,
            rows,
            product=lambda tokens, s: tokens @ layer.weight.split(layer.sizes)[s].T,
            weight=lambda: layer.weight,
            bias=layer.bias,
        )

    torch.testing.assert_close(result(), expected(layer, x, slot_of))
    layer.factors.use(0, SlotUse((2,) * 3, (False,) * 3, ("",) * 3))
    torch.testing.assert_close(result(), expected(layer, x, slot_of))
    layer.factors.drop(1)
    torch.testing.assert_close(result(), expected(layer, x, slot_of))


def test_many_tokens_of_one_adapter_form_its_weight() -> None:
    assert not forms_weight(4, 1, torch.float32, "cpu")
    assert forms_weight(4, 512, torch.float32, "cpu")
    assert not forms_weight(1, 8, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    exact = make_layer([16, 8, 8], bias=True)
    layer = Layer(
        exact.weight.to(dtype),
        exact.bias.to(dtype),
        LayerFactors(
            [A.to(dtype) for A in exact.factors.A], [B.to(dtype) for B in exact.factors.B], exact.factors.uses
        ),
        exact.sizes,
    )
    x = torch.randn(len(MIXES["prefill"]), INPUTS, dtype=torch.float64)
    y, _ = run(layer, x.to(dtype), MIXES["prefill"])
    reference = expected(exact, x, MIXES["prefill"])
    error = (y.double() - reference).norm() / reference.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("interleaved", [False, True], ids=["prompts", "interleaved"])
@pytest.mark.parametrize("keep_base", [True, False], ids=["residual", "pure"])
def test_half_precision_keeps_small_deviations(keep_base: bool, interleaved: bool) -> None:
    """M is 1 +- 0.3 %, which bfloat16 cannot represent beside 1: the deviation is formed beside W."""
    torch.manual_seed(0)
    sizes, use = [16, 8], SlotUse((2, 3), (keep_base,) * 2, ("", ""), near_one=True)
    A = [torch.randn(2, RANK, INPUTS) for _ in sizes]
    B = [0.002 * torch.randn(2, RANK, size) for size in sizes]
    if not keep_base:  # the first rank is 1, and the others deviate from it
        for slice_A, slice_B in zip(A, B, strict=True):
            slice_A[:, 0], slice_B[:, 0] = 1, 1
    half = torch.bfloat16
    rounded = [[part.to(half) for part in parts] for parts in (A, B)]
    layer = Layer(
        torch.randn(24, INPUTS).to(half), None, LayerFactors(*rounded, uses={0: use, 1: use}), sizes
    )
    exact = Layer(
        layer.weight.double(),
        None,
        LayerFactors(*([part.double() for part in parts] for parts in rounded), uses=layer.factors.uses),
        sizes,
    )
    slot_of = [0, 1, -1] * 90 if interleaved else [-1] * 3 + [1] * 90 + [0] * 90
    x = torch.randn(len(slot_of), INPUTS).to(half)
    y, counts = run(layer, x, slot_of)
    assert set(counts) == {len(x)}  # one product of all tokens with the base model's weight
    assert layer.factors.plan(BatchRows({0: tuple(range(90))}, False, x.device), x[:90]).added[1]
    difference = expected(exact, x.double(), slot_of) - x.double() @ exact.weight.T
    error = (y.double() - (x @ layer.weight.T).double() - difference).norm() / difference.norm()
    rounding = (y.double() - expected(exact, x.double(), slot_of)).norm() / y.double().norm()
    assert rounding < 3e-3
    assert error < 0.7  # of the rounding of y; the whole W * M in bfloat16 loses 0.9 to 1.1
