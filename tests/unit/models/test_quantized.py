"""Adapters on a quantized base compute what they compute on the dequantized model, which is not stored."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import check_quantization
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, perturb, spec
from tests.unit.adapters.helpers import tokens


class Int8Linear(nn.Module):
    """A layer that really quantises: int8 with one scale an output feature, with the names of HQQ's."""

    read: list[StorageWeakRef] = []

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def W_q(self) -> Tensor:
        return self.weight

    def dequantize(self) -> Tensor:
        weight = self.weight * self.scale
        self.read.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


def with_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with every linear layer below the head replaced."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head:
            model.set_submodule(name, make(layer))
    return model


def dense(linear: nn.Linear) -> nn.Linear:
    """What Int8Linear left of the layer, as a plain one."""
    quantised = Int8Linear(linear)
    linear.weight = nn.Parameter(quantised.dequantize(), requires_grad=False)
    return linear


def run(bank: AdapterBank) -> tuple[Tensor, list[Tensor]]:
    """Logits of a mixed batch, and every pool's gradients."""
    ids = [*range(len(bank.specs)), -1]
    bank.route(ids)
    logits = bank.model(input_ids=tokens(len(ids))).logits
    logits.square().sum().backward()
    return logits.detach(), [pool.gradients for pool in bank.pools]


def bank_on(make: Callable[[nn.Linear], nn.Module], checkpointing: str) -> AdapterBank:
    model: Any = with_layers(tiny_model(), make).train()
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    bank = AdapterBank.attach(model, mixed_specs())
    perturb(bank)
    return bank


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_a_quantised_base_gives_the_numbers_of_its_dequantised_self(checkpointing: str) -> None:
    logits, gradients = run(bank_on(Int8Linear, checkpointing))
    expected, expected_gradients = run(bank_on(dense, checkpointing))
    plain, _ = run(bank_on(lambda linear: linear, checkpointing))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert (logits - plain).abs().max() > 1e-3  # it was quantised


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_no_dense_weight_is_kept_between_forward_and_backward(checkpointing: str) -> None:
    bank = bank_on(Int8Linear, checkpointing)
    bank.route([*range(len(bank.specs))])
    Int8Linear.read.clear()
    loss = bank.model(input_ids=tokens(len(bank.specs))).logits.square().sum()
    gc.collect()
    reads = len(Int8Linear.read)
    assert reads > 0
    assert all(storage.expired() for storage in Int8Linear.read)
    loss.backward()
    assert len(Int8Linear.read) > reads


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_bitsandbytes_layers_are_adapted_through_their_own_dequantisation(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="not installed: pip install 'flora-train[quantised]'")
    from peft.utils.integrations import dequantize_module_weight

    if kind == "4bit":
        layer = bnb.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) / 16})
    layer = layer.to("cpu")
    plain = nn.Linear(256, 256, bias=False)
    plain.weight = nn.Parameter(dequantize_module_weight(layer).float(), requires_grad=False)
    outputs = []
    for base in (layer, plain):
        torch.manual_seed(1)
        specs = [
            spec("flora", variant, rank=3, variant=variant, target_modules=["up_proj"])
            for variant in ("pure", "residual")
        ]
        bank = AdapterBank.attach(OneLayer(base), specs)
        perturb(bank)
        bank.route([0, 1, -1])
        y = bank.model(torch.arange(6).view(3, 2))
        y[:2].square().sum().backward()
        outputs.append([y[:2].detach(), *(pool.gradients for pool in bank.pools)])
    torch.testing.assert_close(*outputs)


class OneLayer(nn.Module):
    """An embedding and one layer of 256 x 256."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.up_proj = nn.Embedding(7, 256), layer

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        return self.up_proj(self.embed(ids))


def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(UserError, match="needs a CUDA GPU, and this run is on cpu: leave it at none"):
        check_quantization(ModelConfig(path="x", quantization="4bit"), torch.device("cpu"))
