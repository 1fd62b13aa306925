"""docs/python.md, run as it stands but on a tiny model and the tests' recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import launch_environment
from tests.forked import ROOT, python

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S)


def run(program: str, folder: Path) -> str:
    done = python("-c", program, environment=launch_environment(folder), folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ten_lines_do_what_the_command_line_does(recipe: Path, tmp_path: Path) -> None:
    block = (
        BLOCKS[0]
        .replace("recipe=quickstart", f"recipe={recipe}")
        .replace("training.steps=20", "training.steps=3")
        .replace("lua-flora", "digits-flora")
    )
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    lines = run(block + BLOCKS[1], tmp_path).splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("letters", "digits")) and "{" in line] == [
        "letters",
        "digits",
    ]
    assert (tmp_path / "outputs/from_python/lora-svd/digits-flora/adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "outputs/from_python/run.json").read_text())["finished"]


def test_custom_loop_and_transformers_trainer(checkpoint: Path, tmp_path: Path) -> None:
    checks = """
import json
before = [bank.row(i).clone() for i in range(len(specs))]
assert [round(x, 4) for x in first_losses] > [round(x, 4) for x in losses.tolist()], \
    (first_losses, losses.tolist())
"""
    own_loop = (
        BLOCKS[2]
        .replace("assets/models/smollm2-135m", str(checkpoint))
        .replace(
            "    print(step, losses.tolist())",
            "    first_losses = losses.tolist() if step == 0 else first_losses",
        )
    )
    after = """
assert all(not torch.equal(bank.row(i), before[i]) for i in range(len(specs)))
print("moved", bank_optimizer.rows.steps)
"""
    assert "moved [5, 5, 5, 5]" in run(own_loop + checks + BLOCKS[3] + after, tmp_path)


def test_flora_in_plain_peft(checkpoint: Path, tmp_path: Path) -> None:
    block = BLOCKS[4].replace("assets/models/smollm2-135m", str(checkpoint))
    said = run(
        block + "print(model.peft_config['default'].peft_type.value, len(model.active_adapters))", tmp_path
    )
    assert "trainable params: 896 ||" in said
    assert said.splitlines()[-1] == "FLORA 1"


def test_torch_is_not_loaded_before_something_needs_it() -> None:
    program = (
        "import sys, flora_train; flora_train.load_config; assert 'torch' not in sys.modules; "
        "flora_train.make_spec; print(flora_train.nothing)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "has no attribute 'nothing'" in done.stderr


def test_a_bank_that_pages_is_refused(tmp_path: Path) -> None:
    from flora_train import AdapterBank, TorchBankOptimizer, TrainingConfig
    from flora_train.adapters.paging import Paging
    from tests.architectures import tiny_model
    from tests.conftest import mixed_specs

    bank = AdapterBank.attach(tiny_model(), mixed_specs(), paging=Paging(2, tmp_path))
    with pytest.raises(ValueError, match="a bank that pages can only be trained by flora_train's own loop"):
        TorchBankOptimizer(bank, TrainingConfig(steps=1))


def test_the_optimizer_s_state_comes_back() -> None:
    import torch

    from flora_train import AdapterBank, TorchBankOptimizer, TrainingConfig
    from tests.architectures import tiny_model
    from tests.conftest import mixed_specs
    from tests.unit.adapters.helpers import tokens

    def trained(steps: int, state: dict[str, object] | None = None) -> tuple[TorchBankOptimizer, AdapterBank]:
        bank = AdapterBank.attach(tiny_model(), mixed_specs())
        optimizer = TorchBankOptimizer(bank, TrainingConfig(steps=10))
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            bank.route([0, 2, -1])
            bank.model(input_ids=tokens(3)).logits.square().mean().backward()
            optimizer.step()
        return optimizer, bank

    half, _ = trained(2)
    resumed, bank = trained(2, {**half.state_dict()})
    whole, expected = trained(4)
    assert resumed.rows.steps == whole.rows.steps
    assert [step > 0 for step in whole.rows.steps] == [i in (0, 2) for i in range(len(expected.specs))]
    for i in range(len(expected.specs)):
        assert torch.equal(bank.row(i), expected.row(i))
