"""A run with a gate, from its recipe to trained gates: rows name their members, and folders hold these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.config.load import validate
from flora_train.export.gate_members import members_of
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from flora_train.run_context import load_context, resolve_config
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.trainer import Trainer
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.unit.data.conftest import byte_tokenizer


def saved_base(folder: Path) -> Any:
    config: Any = tiny_model().config
    config.vocab_size = 300
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def test_a_run_trains_gates_over_folders(tmp_path: Path) -> None:
    plain = AdapterBank.attach(
        saved_base(tmp_path / "base"), [spec("lora", "lua", rank=2), spec("flora", "perl", rank=2)]
    )
    perturb(plain)
    base = BaseModel(str(tmp_path / "base"))
    over = [export_peft(plain, name, tmp_path / name, base=base) for name in ("lua-lora", "perl-flora")]
    rows = [{"text": f"{name} {i}", "member": name} for i in range(40) for name in ("lua-lora", "perl-flora")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = {"method": "meteora", "lr": 0.1, "over": [str(folder) for folder in over], "weight_decay": 0.1}
    config = validate(
        {
            "name": "gates",
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "base")},
            "tasks": {"mixed": {"train": str(tmp_path / "rows.jsonl"), "task_id": "member"}},
            "adapters": {"gate": gate, "lora": {"method": "lora", "lr": 1e-3}},
            "training": {"steps": 3, "tokens_per_step": 200, "max_length": 32},
        }
    )
    folder = RunFolder(tmp_path / "run")
    context = load_context(resolve_config(config, folder), folder, torch.device("cpu"))
    bank, adapter = context.bank, context.bank.ids["mixed-gate"]
    trainer = Trainer(context)
    init_from_peft(bank, range(len(bank.specs)))
    before = {module: params["gate"].clone() for module, params in bank.parameters_of("mixed-gate").items()}
    trainer.train()
    for module, params in bank.parameters_of("mixed-gate").items():
        assert not torch.equal(params["gate"], before[module])
    for name, modules in members_of(bank, adapter).items():
        trained = plain.parameters_of(name)
        assert modules.keys() == trained.keys()
        for module, views in modules.items():
            assert all(torch.equal(view, trained[module][param]) for param, view in views.items())
