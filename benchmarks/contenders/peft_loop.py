"""PEFT, adapter by adapter: activate it, forward and backward of its rows, then one AdamW step for all.

Methods: lora, hira.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from workload import LEARNING_RATE, RANK, TARGETS, load_model, make_batch, parse, serve

work = parse()
base = load_model(work)
ids = make_batch(work, base.config.vocab_size)
rank = RANK[work.method]
if work.method == "lora":
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
else:
    config = HiraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
model = get_peft_model(base, config, adapter_name=work.names[0])
for name in work.names[1:]:
    model.add_adapter(name, config)
parameters = [
    p for n, p in model.named_parameters() if f"{'lora' if work.method == 'lora' else 'hira'}_" in n
]
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
model.train()


def step() -> None:
    for name, rows in zip(work.names, ids.split(work.rows_each), strict=True):
        model.set_adapter(name)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


serve(step)
