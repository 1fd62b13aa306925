"""PEFT's `adapter_names`: all adapters in one batch. LoRA only, because PEFT ignores the names for HiRA.

PEFT refuses it in training mode, so that the model stays in evaluation mode.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from peft import LoraConfig, get_peft_model
from workload import LEARNING_RATE, RANK, TARGETS, load_model, make_batch, parse, serve

work = parse()
base = load_model(work)
ids = make_batch(work, base.config.vocab_size)
rank = RANK["lora"]
config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
model = get_peft_model(base, config, adapter_name=work.names[0])
for name in work.names[1:]:
    model.add_adapter(name, config)
parameters = [p.requires_grad_(True) for n, p in model.named_parameters() if "lora_" in n]
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
names = [name for name in work.names for _ in range(work.rows_each)]
model.eval()


def step() -> None:
    loss = model(input_ids=ids, labels=ids, adapter_names=names, use_cache=False).loss
    (loss * work.adapters).backward()
    optimizer.step()
    optimizer.zero_grad()


serve(step)
