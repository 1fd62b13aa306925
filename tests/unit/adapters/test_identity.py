"""Every adapter starts as the identity, to the bit, and contains the families that it generalises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import HiraConfig, get_peft_model
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.spec import AdapterSpec
from tests.architectures import tiny_model
from tests.conftest import FEW, mixed_specs, perturb, spec
from tests.unit.adapters.helpers import logits, plain_logits, tokens
from tests.unit.training.harness import make_trainer, plans_of, train_together

STARTS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("flora", {"variant": variant, "rank": rank})
        for variant in ("pure", "residual")
        for rank in (1, 2, 4, 16)
    ),
    *(("lora", {"rank": rank, "rslora": rslora}) for rank in (1, 8) for rslora in (False, True)),
    ("ia3", {"target_modules": "all-linear", "feedforward_modules": []}),
]


@pytest.mark.parametrize("architecture", FEW)
@pytest.mark.parametrize("rows", [1, 12], ids=["few-tokens", "many-tokens"])  # both formulations of fLoRA
def test_every_method_starts_as_the_exact_identity(architecture: str, rows: int) -> None:
    x = tokens(rows)
    expected = plain_logits(architecture, x)
    specs = [spec(method, family=f"start{i}", **options) for i, (method, options) in enumerate(STARTS)]
    bank = AdapterBank.attach(tiny_model(architecture).eval(), specs)
    for i, (method, options) in enumerate(STARTS):
        assert torch.equal(logits(bank, x, [i] * rows), expected), (method, options)


@pytest.mark.parametrize("architecture", FEW)
def test_ia3_on_its_default_targets_starts_as_the_exact_identity(architecture: str) -> None:
    x = tokens(4)
    bank = AdapterBank.attach(tiny_model(architecture).eval(), [spec("ia3")])
    assert torch.equal(logits(bank, x, [0] * 4), plain_logits(architecture, x))
    perturb(bank)
    assert not torch.equal(logits(bank, x, [0] * 4), plain_logits(architecture, x))


def test_start_depends_on_seed_name_and_layer_only() -> None:
    ours = spec("flora", "c", "pure", rank=3, variant="pure")
    alone = AdapterBank.attach(tiny_model(), [ours], seed=7)
    among = AdapterBank.attach(
        tiny_model(), [*mixed_specs(), spec("flora", "d", "pure", rank=3, variant="pure")], seed=7
    )
    assert torch.equal(alone.row(0), among.row(among.ids["c-pure"]))
    assert not torch.equal(among.row(among.ids["c-pure"]), among.row(among.ids["d-pure"]))
    assert not torch.equal(alone.row(0), AdapterBank.attach(tiny_model(), [ours], seed=8).row(0))
    values = alone.parameters_of("c-pure")
    q = [values[f"model.layers.{i}.self_attn.q_proj"]["A"] for i in range(2)]
    assert not torch.equal(*q)


@pytest.mark.parametrize("variant", ["pure", "residual"])
def test_learnt_product_has_full_rank_where_an_all_alike_start_stays_at_rank_one(
    tmp_path: Path, variant: str
) -> None:
    """`pure` multiplies by B A, `residual` by 1 + B A: what is learnt is B A."""
    ranks = {}
    for start in ("ours", "all alike"):
        trainer = make_trainer([spec("flora", "a", rank=4, variant=variant)], tmp_path)
        modules = trainer.bank.parameters_of("a-flora")
        if start == "all alike":
            for params in modules.values():
                params["A"].fill_(1.0)
                params["B"].fill_(0.25 if variant == "pure" else 0.0)
        train_together(trainer, plans_of(trainer, 6))
        ranks[start] = {name: numerical_rank(params["A"], params["B"]) for name, params in modules.items()}
    assert set(ranks["ours"].values()) == {4}
    assert set(ranks["all alike"].values()) == {1}


def numerical_rank(A: Tensor, B: Tensor) -> int:
    """Singular values of B A above 1e-4 of the largest: far above float32 rounding, far below what six steps
    learn."""
    values = torch.linalg.svdvals(B.double() @ A.double())
    return int((values > 1e-4 * values[0]).sum())


def test_flora_of_rank_one_with_a_one_equals_ia3_without_bias() -> None:
    x = tokens(4)
    options: dict[str, Any] = {"target_modules": "all-linear"}
    flora = AdapterBank.attach(tiny_model().eval(), [spec("flora", rank=1, variant="pure", **options)])
    ia3 = AdapterBank.attach(tiny_model().eval(), [spec("ia3", feedforward_modules=[], **options)])
    perturb(ia3)
    scales = ia3.parameters_of("task-ia3")
    for module, params in flora.parameters_of("task-flora").items():
        params["A"].fill_(1.0)
        params["B"][:, 0] = scales[module]["l"]
    y = logits(ia3, x, [0] * 4)
    torch.testing.assert_close(logits(flora, x, [0] * 4), y, rtol=0, atol=1e-5)
    assert (y - plain_logits("llama", x)).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", FEW)
@pytest.mark.parametrize(
    "ours",
    [
        pytest.param(spec("flora", rank=3, variant="pure"), id="pure"),
        pytest.param(spec("flora", rank=4, variant="residual"), id="residual"),
    ],
)
def test_flora_equals_peft_s_hira_in_value_and_merged_weight(architecture: str, ours: AdapterSpec) -> None:
    """pure, r = HiRA of r + 1 with one rank for the -1; residual, r = HiRA of r. PEFT's own layers are the
    judge."""
    x = tokens(4)
    bank = AdapterBank.attach(tiny_model(architecture).eval(), [ours])
    perturb(bank)
    pool = bank.pools[0]
    config = HiraConfig(
        r=ours.rank + (ours.offset == 0.0),
        target_modules=list(pool.targets),
        fan_in_fan_out=architecture == "gpt2",
    )
    peft: Any = get_peft_model(tiny_model(architecture), config).eval()
    with torch.no_grad():
        for module, params in pool.row(0).items():
            layer = peft.base_model.model.get_submodule(module)
            A, B = as_hira(params["A"], params["B"], ours.offset)
            layer.hira_A["default"].copy_(A)
            layer.hira_B["default"].copy_(B)
        torch.testing.assert_close(logits(bank, x, [0] * 4), peft(x).logits, rtol=0, atol=1e-5)
        merged = peft.merge_and_unload()
    for module, params in pool.row(0).items():
        base: Any = bank.model.get_submodule(module).base_layer
        weight = base.weight.T if pool.targets[module].transposed else base.weight
        weight, bias = pool.method.merge(weight, base.bias, params, spec=ours, feedforward=False)
        theirs: Any = merged.get_submodule(module)
        torch.testing.assert_close(
            weight.T if pool.targets[module].transposed else weight, theirs.weight, rtol=0, atol=1e-6
        )
        assert bias is base.bias
        assert bias is None or torch.equal(bias, theirs.bias)


def as_hira(A: Tensor, B: Tensor, offset: float) -> Sequence[Tensor]:
    if offset:
        return A, B
    return torch.cat([A, torch.ones(1, A.shape[1])]), torch.cat([B, -torch.ones(B.shape[0], 1)], dim=1)


@pytest.mark.parametrize(
    "ours",
    [
        spec("flora", rank=3, variant="pure"),
        spec("flora", rank=3, variant="residual"),
        spec("lora", rank=4, rslora=True),
        spec("ia3"),
    ],
    ids=["pure", "residual", "lora", "ia3"],
)
@pytest.mark.parametrize("architecture", FEW)
def test_merged_layer_computes_what_the_adapted_layer_computes(architecture: str, ours: AdapterSpec) -> None:
    bank = AdapterBank.attach(tiny_model(architecture), [ours])
    perturb(bank)
    pool = bank.pools[0]
    for module, params in pool.row(0).items():
        layer, target = cast(AdapterLinear, bank.model.get_submodule(module)), pool.targets[module]
        x = torch.randn(2, 5, target.in_features, generator=torch.Generator().manual_seed(3))
        weight = layer.weight.T if target.transposed else layer.weight
        weight, bias = pool.method.merge(
            weight, layer.bias, params, spec=ours, feedforward=target.feedforward
        )
        with torch.no_grad(), bank.routed([0, 0]):
            y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=0, atol=1e-5)
