"""rank_pattern, alpha_pattern, layers_to_transform, exclude_modules and regular expressions, as in PEFT."""

from __future__ import annotations

import random
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.methods import METHODS
from flora_train.adapters.peft_config import PeftConfig
from flora_train.adapters.peft_equivalents import as_lora
from flora_train.adapters.spec import rank_text
from flora_train.adapters.targets import endings, find_targets, linear_layers
from flora_train.config.errors import UserError
from flora_train.export.merge import merge_into_base
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel, config_of, tensors_of
from flora_train.export.peft_import import init_from_peft
from flora_train.export.svd_lora import compute_svd_lora
from tests.architectures import ARCHITECTURES, model_inputs, tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.helpers import logits

WHAT_PEFT_WARNS_OF = ("did not match any targeted module", "no modules were excluded")
TOKENS = torch.arange(14).view(2, 7) % 90


def random_options(architecture: str, seed: int) -> dict[str, Any]:
    """Keys of an adapter, which are those of a LoraConfig but for r, lora_alpha and use_rslora."""
    draw = random.Random(f"{architecture} {seed}")
    names = list(linear_layers(tiny_model(architecture)))
    ends = endings(names)
    longer = sorted({".".join(name.split(".")[-2:]) for name in names})

    def some(options: list[str], most: int = 3) -> list[str]:
        return draw.sample(options, min(len(options), draw.randint(1, most)))

    options: dict[str, Any] = {"rank": draw.randint(1, 6), "alpha": draw.choice([1.0, 8.0, 24.0])}
    expressions = [
        rf".*({'|'.join(some(ends))})",
        rf".*[.]{draw.randint(0, 1)}[.].*({'|'.join(some(ends))})",
        draw.choice(names).replace(".", r"\."),
    ]
    options["target_modules"] = draw.choice([some(ends, 4), some(longer, 4), "all-linear", *expressions])
    if draw.random() < 0.5:
        options["exclude_modules"] = draw.choice(
            [some(ends, 2), some(longer), some(names), f".*{draw.choice(ends)}", r".*\.1\..*"]
        )
    if isinstance(options["target_modules"], list) and draw.random() < 0.5:
        options["layers_to_transform"] = draw.choice([0, 1, [1], [0, 1]])
        if draw.random() < 0.5:
            lists = {part for name in names for part, after in _pairs(name) if after.isdigit()}
            options["layers_pattern"] = draw.choice([draw.choice(sorted(lists)), sorted(lists)])
    with suppress(UserError):  # patterns that match something, mostly
        names = list(find_targets(tiny_model(architecture), spec("lora", **options)))
        ends = endings(names)
    patterns = [*ends, *names, rf"\d+\..*({'|'.join(some(ends))})", rf"^{names[-1]}", draw.choice(longer)]
    if draw.random() < 0.6:
        options["rank_pattern"] = {pattern: draw.randint(1, 9) for pattern in some(patterns, 4)}
    if draw.random() < 0.6:
        options["alpha_pattern"] = {pattern: float(draw.randint(1, 32)) for pattern in some(patterns, 4)}
    if draw.random() < 0.3:
        options["rslora"] = True
    return options


def _pairs(name: str) -> list[tuple[str, str]]:
    parts = name.split(".")
    return list(pairwise(parts))


def peft_config(options: dict[str, Any]) -> LoraConfig:
    renamed = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"}
    return LoraConfig(**{renamed.get(key, key): value for key, value in options.items()})


def peft_layers(architecture: str, options: dict[str, Any]) -> dict[str, tuple[int, float]] | None:
    """Module -> rank and scaling of PEFT's own model; None where it refuses the options, or warns of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = get_peft_model(tiny_model(architecture), peft_config(options))
        except ValueError:
            return None
    if any(text in str(warning.message) for warning in caught for text in WHAT_PEFT_WARNS_OF):
        return None
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_ranks_and_scales_are_those_of_peft(architecture: str) -> None:
    accepted = 0
    for seed in range(20):
        options = random_options(architecture, seed)
        expected = peft_layers(architecture, options)
        ours = spec("lora", **options)
        try:
            targets = find_targets(tiny_model(architecture), ours)
        except UserError:
            assert expected is None, options
            continue
        assert {name: (ours.at(name).rank, ours.at(name).scaling) for name in targets} == expected, options
        accepted += 1
    assert accepted >= 8


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "t5", "whisper"])
@pytest.mark.parametrize("method", ["lora", "flora", "pure"])
def test_export_and_import_keep_what_a_model_computes(architecture: str, method: str, tmp_path: Path) -> None:
    """Plain PEFT loads the folder; init_from reads it; merging and a LoRA of full rank compute the same."""
    options = options_for(architecture)
    if method != "lora":
        options = {key: value for key, value in options.items() if not key.startswith("alpha")}
    if method == "pure":
        options |= {"variant": "pure"}
    adapter = spec(method.replace("pure", "flora"), **options)
    bank = AdapterBank.attach(tiny_model(architecture).eval(), [adapter])
    perturb(bank)
    inputs = model_inputs(architecture, TOKENS)
    with torch.no_grad(), bank.routed([0, 0]):
        expected = bank.model(**inputs).logits
    folder = export_peft(bank, adapter.name, tmp_path / "adapter", base=BaseModel("base"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(did not match|Found missing adapter keys).*")
        plain = PeftModel.from_pretrained(tiny_model(architecture).eval(), str(folder))
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    again = AdapterBank.attach(tiny_model(architecture).eval(), [replace(adapter, init_from=str(folder))])
    init_from_peft(again, [0])
    with torch.no_grad(), again.routed([0, 0]):
        torch.testing.assert_close(again.model(**inputs).logits, expected, atol=1e-6, rtol=1e-6)
    svd = compute_svd_lora(bank, adapter.name, rank=32, max_error=None)
    assert svd.error < 1e-5
    merged = merge_into_base(bank, adapter.name)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adalora_of_different_ranks_is_equal_and_read_back() -> None:
    """The form for models with joined experts: one rank and one scale for all modules."""
    adapter = spec("lora", **options_for("llama"))
    bank = AdapterBank.attach(tiny_model(), [adapter])
    perturb(bank)
    layers = bank.pools[0].targets
    content = config_of(
        bank.model, bank.base_names(), layers, spec=adapter, base=BaseModel("base"), form="ADALORA"
    )
    parameters = bank.parameters_of(adapter.name)
    tensors = tensors_of(parameters, layers, adapter, form="ADALORA")
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A")} == {5}
    config, read = as_lora(PeftConfig(content), tensors)
    for module, params in parameters.items():
        expected = adapter.at(module).scaling * params["B"] @ params["A"]
        A, B = (read[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        assert len(A) == adapter.at(module).rank == config.rank_at(module)
        torch.testing.assert_close(config.scale_at(module) * B @ A, expected, atol=1e-6, rtol=1e-5)


def options_for(architecture: str) -> dict[str, Any]:
    """Three ranks and three scales, in the second layer and elsewhere."""
    names = list(linear_layers(tiny_model(architecture)))
    first, *_, last = endings(names)
    return {
        "rank": 3,
        "alpha": 6.0,
        "target_modules": rf".*\.({first}|{last})",
        "exclude_modules": [names[0]],
        "rank_pattern": {rf"1\..*{last}": 5, first: 2},
        "alpha_pattern": {last: 4.0, rf".*1.*{first}": 12.0},
    }


def test_a_lora_is_read_as_a_dora_that_computes_the_same(tmp_path: Path) -> None:
    plain = spec("lora", **options_for("llama"))
    bank = AdapterBank.attach(tiny_model().eval(), [plain])
    perturb(bank)
    folder = export_peft(bank, plain.name, tmp_path / "lora", base=BaseModel("base"))
    dora = spec("dora", **options_for("llama"), init_from=str(folder))
    again = AdapterBank.attach(tiny_model().eval(), [dora])
    init_from_peft(again, [0])
    torch.testing.assert_close(
        logits(again, TOKENS, [0, 0]), logits(bank, TOKENS, [0, 0]), atol=1e-5, rtol=1e-5
    )


def test_lr_ratio_of_a_dora_is_that_of_the_parameters_that_peft_gives_it() -> None:
    config = LoraConfig(target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(tiny_model(), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=4.0)
    faster = [
        parameter for group in optimizer.param_groups if group["lr"] == 4.0 for parameter in group["params"]
    ]
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in faster)}
    kinds = {"lora_B": "B", "lora_magnitude_vector": "m"}
    assert {kinds[name.split(".")[-3]] for name in names} == METHODS["dora"].lr_ratio_parameters


def test_options_hold_for_every_method() -> None:
    options = {"layers_to_transform": 1, "exclude_modules": r".*\.k_proj"}
    for method in ("flora", "lora", "dora", "ia3"):
        targets = find_targets(tiny_model(), spec(method, **options))
        assert {name.split(".")[2] for name in targets} == {"1"}
        assert not any(name.endswith("k_proj") for name in targets)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"target_modules": r".*q_prj"},
            r"target_modules = '\.\*q_prj': is a regular expression that matches",
        ),
        (
            {"target_modules": "q_proj"},
            r"'q_proj': is a regular .* such as model\..*write a list: \[q_proj\]",
        ),
        ({"target_modules": "qproj"}, r"'qproj': is a regular expression .* Did you mean 'q_proj'\?"),
        (
            {"target_modules": r".*self_attn.*"},
            r"matches model\.layers\.0\.self_attn, a LlamaAttention; supp",
        ),
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern = 'q_prj': matches none .* mean 'q_proj'\?"),
        ({"alpha_pattern": {"layers.7": 2}}, r"alpha_pattern = 'layers.7': matches none of the targets"),
        ({"exclude_modules": ["lm_hed"]}, r"exclude_modules = 'lm_hed': matches no module .* 'lm_head'\?"),
        ({"exclude_modules": "lm_head|x"}, None),
        ({"exclude_modules": "q_proj"}, r"'q_proj': is a regular expression .* write a list: \[q_proj\]"),
        ({"exclude_modules": ".*"}, r"exclude_modules = '\.\*': excludes all 14 modules that target_modules"),
        ({"layers_to_transform": [1, 2]}, r"layers_to_transform = 2: is no layer of Llama.*; it has 0, 1"),
        (
            {"layers_to_transform": 1, "layers_pattern": "layer"},
            r"layers_pattern = 'layer': is no list of layers .* it has layers\. Did you mean 'layers'\?",
        ),
        (
            {"layers_to_transform": 1, "target_modules": ["layers.0.self_attn.q_proj"]},
            r"layers_to_transform = \[1\]: has no layer with a module that target_modules select.* layers 0",
        ),
    ],
    ids=str,
)
def test_options_that_fit_nothing_name_key_value_and_fix(options: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert find_targets(tiny_model(), spec("lora", **options))
        return
    with pytest.raises(UserError, match=words):
        find_targets(tiny_model(), spec("lora", **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ".*(q_proj"}, "is not a regular expression: missing"),
        ({"target_modules": "all_linear"}, "Did you mean 'all-linear'"),
        ({"exclude_modules": "*q"}, "is not a regular expression: nothing to repeat"),
        ({"rank_pattern": {"q)": 2}}, r"has the key 'q\)', which is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "greater than or equal to 1"),
        ({"alpha_pattern": {"q": 0}}, "greater than 0"),
        ({"layers_pattern": "layers"}, "requires layers_to_transform"),
        ({"layers_to_transform": [-1]}, "greater than or equal to 0"),
        ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "cannot be combined with a regular"),
        ({"layers_to_transform": 1, "layers_pattern": "("}, "which is not a regular expression"),
        ({"exclude_modules": []}, "at least 1"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        spec("lora", **options)
    if "pattern" in next(iter(options)) and options.keys() != {"layers_pattern"}:
        with pytest.raises(ValidationError, match="has no meaning for method ia3"):
            spec("ia3", **{key: {"q": 1} for key in options})


def test_ranks_of_a_pool_and_their_text() -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "v_proj": 9}}
    bank = AdapterBank.attach(tiny_model(), [spec("lora", rank=4, **patterns), spec("ia3")])
    assert [pool.ranks for pool in bank.pools] == [(2, 9), (0, 0)]
    assert (rank_text(9, 2), rank_text(4, None), rank_text(4, 4), rank_text(0, 0)) == ("2 to 9", "4", "4", "")
