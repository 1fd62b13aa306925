"""Writes the tokens and labels that TRL's SFTTrainer makes of conversations with assistant_only_loss."""

import json
import sys
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

request = json.loads(Path(sys.argv[1]).read_text())
shipped = Path(trl.__file__).parent / "chat_templates"
torch.manual_seed(0)


def tokenized(case):
    """(template, examples) of one case, or (template, the error)."""
    tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"])
    template = case["template"]
    if template.endswith(".jinja"):
        template = (shipped / template).read_text(encoding="utf-8")
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    args = SFTConfig(
        output_dir=str(Path(request["json"]).parent / "trl"),
        assistant_only_loss=True,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    examples = []
    for row in case["rows"]:
        trainer = SFTTrainer(
            model=LlamaForCausalLM(config),
            args=args,
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        (example,) = trainer.train_dataset
        examples.append({"ids": example["input_ids"], "labels": example["labels"]})
    return template, examples


results = {}
for case in request["cases"]:
    template, examples = tokenized(case)
    results[case["name"]] = {"template": template, "examples": examples}
templates = {path.name: path.read_text(encoding="utf-8") for path in sorted(shipped.glob("*_training.jinja"))}
Path(request["json"]).write_text(json.dumps({"cases": results, "templates": templates}))
