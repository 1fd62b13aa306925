"""A tiny base model that vLLM serves on a CPU, and an adapter of every method for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.evaluation.generation import complete
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.conftest import perturb, spec

WORDS = ["<pad>", "<end>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 =+().:\n"]
MAX_LENGTH = 512
OWN_TYPE = "own"
"""The family of an adapter that is exported as a FLORA."""


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are characters."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_base(folder: Path, **sizes: Any) -> Path:
    """Write a random-weight Llama of two layers and a character tokenizer. Its heads have 32 numbers, the
    fewest that vLLM's attention on a CPU computes."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_LENGTH,
    }
    config = LlamaConfig(
        vocab_size=len(WORDS), bos_token_id=None, eos_token_id=1, pad_token_id=0, **shape, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # of initial size, an untrained model answers every text alike
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def specs_of_every_method() -> list[AdapterSpec]:
    """fLoRA in both variants and as a FLORA, LoRA and IA3, of different ranks and targets."""
    attention = ["q_proj", "v_proj"]
    return [
        spec("flora", "a", "residual", rank=3, variant="residual"),
        spec("flora", "b", "pure", rank=2, variant="pure"),
        spec("flora", "c", "some", rank=5, variant="residual", target_modules=[*attention, "down_proj"]),
        spec("flora", "a", OWN_TYPE, rank=4, variant="pure"),
        spec("lora", "a", "lora", rank=4),
        spec("lora", "b", "lora_some", rank=8, target_modules=["k_proj", "gate_proj"]),
        spec("ia3", "a", "ia3"),
        spec("ia3", "b", "ia3_some", target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    ]


@dataclass(frozen=True)
class Exported:
    """A base model and adapters as folders, and what the trainer's own bank computes with them."""

    base: Path
    folders: dict[str, Path]
    """Adapter -> its folder."""
    bank: AdapterBank
    tokenizer: Any

    @property
    def lora(self) -> str:
        """The name of a LoRA, which vLLM serves without the plugin."""
        return next(name for name in self.folders if name.endswith("-lora"))

    def greedy(self, name: str | None, prompt: str, tokens: int = 12) -> str:
        """The text that the bank generates with an adapter; None is the base model."""
        adapter = BASE_ID if name is None else self.bank.ids[name]
        requests = [(prompt, adapter)]
        [text] = complete(
            self.bank.model, self.bank, self.tokenizer, requests=requests, max_new_tokens=tokens
        )
        return text


def export_adapters(base: Path, folder: Path, specs: list[AdapterSpec] | None = None) -> Exported:
    """Write an adapter of every method (or of these specs) that changes the base model much."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    bank = AdapterBank.attach(model, specs or specs_of_every_method())
    perturb(bank)
    folders: dict[str, Path] = {}
    for one in bank.specs:
        own_type = one.family == OWN_TYPE
        folders[one.name] = export_peft(
            bank, one.name, folder / one.name, base=BaseModel(str(base)), own_type=own_type
        )
    return Exported(base, folders, bank, AutoTokenizer.from_pretrained(base))


def save_recipe(folder: Path, base: Path) -> Path:
    """Two small tasks x three methods, a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {"letters": "abcdefgh", "digits": "01234567"}
    for name, alphabet in tasks.items():
        rows = [
            {"prompt": alphabet[i % 8], "completion": (alphabet * 4)[i % 8 + 1 : i % 8 + 9 + i % 5]}
            for i in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "name": "tiny",
        "num_threads": 1,
        "model": {"path": str(base), "dtype": "float32"},
        "tasks": {
            name: {"train": str(folder / f"{name}.jsonl"), "sample_prompts": [alphabet[0]]}
            for name, alphabet in tasks.items()
        },
        "adapters": {
            "flora": {"method": "flora", "rank": 2, "lr": 0.1},
            "lora": {"method": "lora", "rank": 2, "lr": 0.05},
            "ia3": {"method": "ia3", "lr": 0.1},
        },
        "training": {"steps": 6, "tokens_per_step": 100, "tokens_per_microbatch": 60, "max_length": 32},
        "evaluation": {"interval": None, "max_new_tokens": 4, "bootstrap_samples": 100},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
