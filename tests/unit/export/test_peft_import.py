"""An adapter starts exactly where a PEFT adapter ended; one that does not fit is refused with a hint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from tests.architectures import tiny_model
from tests.conftest import FEW, spec
from tests.unit.adapters.helpers import logits, tokens
from tests.unit.export.test_peft_format import perturbed_bank


@pytest.mark.parametrize(("architecture", "own_type"), [*((name, False) for name in FEW), ("llama", True)])
def test_every_exported_adapter_comes_back_with_the_same_bits(
    architecture: str, own_type: bool, tmp_path: Path
) -> None:
    before = perturbed_bank(architecture)
    for s in before.specs:
        export_peft(
            before,
            s.name,
            tmp_path / s.name,
            base=BaseModel("base"),
            own_type=own_type and s.method == "flora",
        )
    specs = [replace(s, init_from=str(tmp_path / s.name)) for s in before.specs]
    after = AdapterBank.attach(tiny_model(architecture), specs)
    untouched = AdapterBank.attach(tiny_model(architecture), before.specs)
    init_from_peft(after, range(len(after.specs)))
    for i in range(len(specs)):
        assert torch.equal(after.row(i), before.row(i))
        assert not torch.equal(untouched.row(i), before.row(i))


TARGETS = ["q_proj", "down_proj"]
THEIRS: dict[str, tuple[Any, AdapterSpec]] = {
    "LoRA": (
        LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"),
        spec("lora", rank=3, alpha=6.0, target_modules=TARGETS),
    ),
    "HiRA": (
        HiraConfig(r=3, target_modules=TARGETS, task_type="CAUSAL_LM"),
        spec("flora", rank=3, target_modules=TARGETS),
    ),
    "IA3": (
        IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        spec("ia3", target_modules=TARGETS, feedforward_modules=["down_proj"]),
    ),
}


def made_by_peft(config: Any, folder: Path) -> Path:
    """An adapter of random numbers, saved by PEFT."""
    model = get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", THEIRS)
def test_an_adapter_that_peft_made_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    config, ours = THEIRS[kind]
    model = get_peft_model(tiny_model(), config).eval()
    folder = made_by_peft(config, tmp_path / "theirs")
    model.load_adapter(str(folder), "trained")
    model.set_adapter("trained")
    x = tokens(3)
    with torch.no_grad():
        expected = model(input_ids=x).logits
    bank = AdapterBank.attach(tiny_model().eval(), [replace(ours, init_from=str(folder))])
    identity = logits(bank, x, [0, 0, 0])
    init_from_peft(bank, range(len(bank.specs)))
    found = logits(bank, x, [0, 0, 0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - identity).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (
            spec("lora", rank=4, alpha=6.0, target_modules=TARGETS),
            r"adapters\.lora\.rank = 4: differs from the rank of .*: set it to 3",
        ),
        (
            spec("lora", rank=3, alpha=3.0, target_modules=TARGETS),
            r"adapters\.lora\.alpha = 3\.0: .*: set it to 6, and rslora to False",
        ),
        (spec("lora", rank=3, alpha=6.0), r"init_from = .*: lacks \d+ tensors, .* target_modules"),
        (spec("lora", rank=3, alpha=6.0, target_modules=["q_proj"]), r"init_from = .*: has \d+ more tensors"),
        (
            spec("flora", rank=3, variant="pure", target_modules=TARGETS),
            r"has the PEFT type LORA, and an adapter of method flora starts from HIRA",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused_without_changes(
    ours: AdapterSpec, words: str, tmp_path: Path
) -> None:
    folder = made_by_peft(THEIRS["LoRA"][0], tmp_path / "theirs")
    good = replace(THEIRS["LoRA"][1], name="good", init_from=str(folder))
    bank = AdapterBank.attach(tiny_model(), [good, replace(ours, init_from=str(folder))])
    before = [bank.row(i).clone() for i in range(2)]
    with pytest.raises(UserError, match=words):
        init_from_peft(bank, range(len(bank.specs)))
    assert all(torch.equal(bank.row(i), before[i]) for i in range(2))


@pytest.mark.usefixtures("log_to_stderr")
def test_a_residual_flora_comes_closer_to_a_lora_with_its_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_by_peft(THEIRS["LoRA"][0], tmp_path / "theirs")
    x = tokens(3)
    lora = AdapterBank.attach(tiny_model().eval(), [replace(THEIRS["LoRA"][1], init_from=str(folder))])
    init_from_peft(lora, [0])
    expected, identity = logits(lora, x, [0] * 3), logits(lora, x, [-1] * 3)
    distances, errors = [], []
    for rank in (1, 4, 16, 32):
        ours = replace(spec("flora", rank=rank, target_modules=TARGETS), init_from=str(folder))
        bank = AdapterBank.attach(tiny_model().eval(), [ours])
        init_from_peft(bank, [0])
        distances.append(float((logits(bank, x, [0] * 3) - expected).norm() / (expected - identity).norm()))
        errors.append(float(capsys.readouterr().err.rpartition("|dW| = ")[2]))
    assert errors == sorted(errors, reverse=True)
    assert distances[0] < 1.0
    assert distances[-1] < 0.05


def test_hira_adapter_is_not_a_pure_flora(tmp_path: Path) -> None:
    folder = made_by_peft(THEIRS["HiRA"][0], tmp_path / "theirs")
    pure = spec("flora", rank=2, variant="pure", target_modules=TARGETS)
    bank = AdapterBank.attach(tiny_model(), [replace(pure, init_from=str(folder))])
    with pytest.raises(
        UserError, match=r"is W0 \* \(1 \+ B A\): start from it with variant=residual and rank=3"
    ):
        init_from_peft(bank, range(len(bank.specs)))


@pytest.mark.parametrize(("option", "value"), [("lora_bias", True), ("bias", "all"), ("use_qalora", True)])
def test_options_that_no_adapter_here_has_are_refused(option: str, value: Any, tmp_path: Path) -> None:
    folder = made_by_peft(THEIRS["LoRA"][0], tmp_path / "theirs")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    bank = AdapterBank.attach(tiny_model(), [replace(THEIRS["LoRA"][1], init_from=str(folder))])
    with pytest.raises(UserError, match=f"{option}.*cannot be used here"):
        init_from_peft(bank, range(len(bank.specs)))


def test_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    bank = AdapterBank.attach(tiny_model(), [replace(THEIRS["LoRA"][1], init_from=str(tmp_path))])
    with pytest.raises(UserError, match=r"adapters\.lora\.init_from = .*is not a PEFT adapter"):
        init_from_peft(bank, range(len(bank.specs)))
