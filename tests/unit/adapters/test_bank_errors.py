"""Every mistake with adapter names, ids and targets is one clear error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.utils import constants
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE
from flora_train.adapters.targets import linear_layers
from flora_train.config.errors import UserError
from tests.architectures import tiny_model
from tests.conftest import FEW, spec
from tests.unit.adapters.helpers import logits, tokens


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank.attach(
        tiny_model().eval(), [spec("flora", "lua"), spec("lora", "lua"), spec("ia3", "perl")]
    )


def test_unknown_adapter_name_lists_the_names_and_the_closest(bank: AdapterBank) -> None:
    with pytest.raises(
        UserError,
        match=r"'lua-flore': there are lua-flora, lua-lora or perl-ia3\. Did you mean 'lua-flora'\?",
    ):
        bank.route(["lua-flore"])
    with pytest.raises(UserError, match=r"there are lua-flora, lua-lora or perl-ia3\.$"):
        bank.parameters_of("zzz")


@pytest.mark.parametrize("wrong", [3, -2])
def test_adapter_id_out_of_range_names_the_range(bank: AdapterBank, wrong: int) -> None:
    for given in ([0, wrong], torch.tensor([0, wrong])):
        with pytest.raises(
            UserError, match=f"adapter_ids = {wrong}: ids run from 0 to 2, and -1 is the base model"
        ):
            bank.route(given)


def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="'lua-lora': names of adapters must be unique"):
        AdapterBank.attach(
            tiny_model(), [spec("lora", "lua"), spec("ia3", "lua"), spec("flora", "lua", "lora")]
        )


def test_an_adapter_cannot_take_the_name_of_the_base() -> None:
    with pytest.raises(UserError, match="__base__ is the base model"):
        AdapterBank.attach(tiny_model(), [replace(spec("lora"), name=BASE)])


@pytest.mark.parametrize(
    ("architecture", "given", "meant"),
    [
        ("llama", "q_prj", "q_proj"),
        ("gpt2", "c_atn", "c_attn"),
        ("opt", "fc_1", "fc1"),
        ("phi", "k_porj", "k_proj"),
    ],
)
def test_target_that_matches_nothing_lists_what_could_match(
    architecture: str, given: str, meant: str
) -> None:
    model = tiny_model(architecture)
    with pytest.raises(UserError) as caught:
        AdapterBank.attach(model, [spec("lora", target_modules=[given])])
    message = str(caught.value)
    assert message.startswith(
        f"adapters.lora.target_modules = '{given}': matches no module of {type(model).__name__}; it has "
    )
    assert message.endswith(f" Did you mean '{meant}'?")
    words = message.split("; it has ")[1].split(". Did")[0].split(", ")
    assert words == sorted({name.rpartition(".")[2] for name in linear_layers(model)})


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("embed_tokens", "Embedding"),
        ("input_layernorm", "LlamaRMSNorm"),
        ("lm_head", "Linear"),
        ("self_attn", "LlamaAttention"),
    ],
)
@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_target_of_an_unsupported_kind_is_named_with_what_is_supported(
    method: str, target: str, kind: str
) -> None:
    options: dict[str, Any] = {"feedforward_modules": []} if method == "ia3" else {}
    with pytest.raises(UserError) as caught:
        AdapterBank.attach(tiny_model(), [spec(method, target_modules=["q_proj", target], **options)])
    message = str(caught.value)
    assert message.startswith(f"adapters.{method}.target_modules = '{target}': matches ")
    assert f"{target}, a {kind}; supported are Linear and Conv1D below the output head: " in message
    assert "down_proj, gate_proj, k_proj" in message


def test_target_that_is_supported_in_some_places_only_is_refused() -> None:
    """Else a name would silently adapt fewer layers than it says."""
    model: Any = tiny_model()
    model.model.layers[1].self_attn.q_proj = nn.Identity()
    with pytest.raises(
        UserError, match=r"'q_proj': matches model\.layers\.1\.self_attn\.q_proj, a Identity; supported are"
    ):
        AdapterBank.attach(model, [spec("lora", target_modules=["q_proj"])])


def test_a_model_without_linear_layers_is_refused() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(3, 2)

    with pytest.raises(UserError, match="Empty has no linear layer to adapt"):
        AdapterBank.attach(Empty(), [spec("lora")])


@pytest.mark.parametrize("architecture", FEW)
def test_all_linear_is_every_linear_layer_but_the_output_head(architecture: str) -> None:
    model = tiny_model(architecture)
    bank = AdapterBank.attach(model, [spec("lora", target_modules="all-linear")])
    left = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith(".base_layer")
    }
    assert left == {"lm_head"}
    per_layer = {"llama": 7, "gpt2": 4, "opt": 6, "phi": 6}[architecture]
    assert len(bank.pools[0].targets) == 2 * per_layer


@pytest.mark.parametrize("architecture", FEW)
def test_ia3_default_targets_are_peft_s_table(architecture: str) -> None:
    targets = AdapterBank.attach(tiny_model(architecture), [spec("ia3")]).pools[0].targets
    available = linear_layers(tiny_model(architecture))

    def selected(table: dict[str, list[str]]) -> set[str]:
        return {
            name for name in available if name.endswith(tuple(f".{suffix}" for suffix in table[architecture]))
        }

    assert set(targets) == selected(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
    inputs = selected(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING)
    assert {name for name, target in targets.items() if target.feedforward} == inputs & set(targets)
    assert any(target.feedforward for target in targets.values())


def test_ia3_without_a_default_for_the_architecture_names_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = tiny_model("phi")
    monkeypatch.setattr(model.config, "model_type", "phi_to_come")  # the tests share this configuration
    hint = (
        "IA3 has no default for architecture 'phi_to_come': choose from dense, fc1, fc2, k_proj, "
        "q_proj, v_proj"
    )
    with pytest.raises(UserError, match=rf"adapters\.ia3\.target_modules: {hint}"):
        AdapterBank.attach(model, [spec("ia3")])
    with pytest.raises(UserError, match=rf"adapters\.ia3\.feedforward_modules: {hint}"):
        AdapterBank.attach(model, [spec("ia3", target_modules=["fc2"])])


def test_feedforward_module_that_is_not_a_target_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"adapters\.ia3\.feedforward_modules = 'up_proj': matches none of the targets k_proj"
    ):
        AdapterBank.attach(
            tiny_model(), [spec("ia3", target_modules=["k_proj"], feedforward_modules=["up_proj"])]
        )


@pytest.mark.parametrize("routed", [4, 3, 12], ids=["no-divisor", "divisor", "multiple"])
def test_wrong_number_of_routed_rows_is_a_clear_error(bank: AdapterBank, routed: int) -> None:
    """6 rows of 10 tokens divide evenly among 3 or 12 routed rows, and would silently use wrong adapters."""
    with pytest.raises(
        RuntimeError, match=rf"{routed} routed rows; call bank\.route with one adapter per row"
    ):
        logits(bank, tokens(6, 10), [0] * routed)


def test_a_base_on_several_devices_is_refused() -> None:
    model = tiny_model()
    model.lm_head = nn.Linear(32, 97, device="meta")
    with pytest.raises(UserError, match=r"\['cpu', 'meta'\]: the base model must be on one device"):
        AdapterBank.attach(model, [spec("lora")])
