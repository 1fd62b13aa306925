"""Which adapters plain PEFT loads: the plan and the run state it, and the exported folders confirm it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from flora_train.cli import main
from flora_train.run_context import load_run
from tests.e2e.conftest import WORDS, Launch, save_tiny_checkpoint
from tests.unit.export.test_loadability import EXPERTS

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of experts with a dense first layer."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "experts")
    sizes = {**EXPERTS, "mlp_only_layers": [0], "vocab_size": len(WORDS), "max_position_embeddings": 128}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(recipe: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content: dict[str, Any] = yaml.safe_load(recipe.read_text())
    content["model"]["path"] = str(experts)
    content["adapters"] = {
        "lora": {**content["adapters"]["lora"], "dropout": 0.0, "target_modules": "all-linear"}
    }
    content["evaluation"]["interval"] = None
    path = tmp_path_factory.mktemp("recipe") / "experts.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_the_plan_says_what_plain_peft_would_do(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"recipe={lora}", f"output_dir={tmp_path / 'run'}"]) == 0
    assert "note: lora: plain PEFT ignores" in capsys.readouterr().out


def test_a_trained_lora_is_the_same_in_plain_peft_though_peft_would_drop_it(
    lora: Path, experts: Path, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    done = launch(f"recipe={lora}", f"output_dir={run}", "training.steps=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.index("note: lora: plain PEFT ignores") < done.stderr.index("2 adapters on 2 tasks")
    assert "exported as an equal ADALORA" in done.stderr
    assert "PeftModel.from_pretrained loads them)" in done.stdout
    assert "PEFT names it ADALORA" in (run / "adapters" / "letters-lora" / "README.md").read_text()
    bank = load_run(str(run))[0].bank
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(experts).eval(), run / "adapters" / "letters-lora"
    )
    with torch.no_grad(), bank.routed(["letters-lora"]):
        ours = bank.model.eval()(input_ids=IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, ours, rtol=1e-4, atol=1e-4)
        assert (ours - AutoModelForCausalLM.from_pretrained(experts).eval()(IDS).logits).abs().max() > 1e-3
    assert main(["export", str(run), "letters-lora", "--as", "lora-svd", "--rank", "2"]) == 0
    assert "note: letters-lora: plain PEFT ignores" in capsys.readouterr().out
