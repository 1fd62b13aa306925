"""AdapterHub's `adapters`: BatchSplit composition of LoRA adapters.

It adapts q, k, v, up and down projections, but cannot adapt o and gate: it is compared with flora_train on
the same five layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import adapters
import torch
from adapters import LoRAConfig
from adapters.composition import BatchSplit
from workload import LEARNING_RATE, RANK, load_model, make_batch, parse, serve

work = parse()
model = load_model(work)
ids = make_batch(work, model.config.vocab_size)
adapters.init(model)
rank = RANK["lora"]
config = LoRAConfig(
    r=rank,
    alpha=2 * rank,
    selfattn_lora=True,
    intermediate_lora=True,
    output_lora=True,
    attn_matrices=["q", "k", "v"],
)
for name in work.names:
    model.add_adapter(name, config=config)
if work.adapters == 1:
    model.train_adapter(work.names[0])
else:
    model.train_adapter(BatchSplit(*work.names, batch_sizes=[work.rows_each] * work.adapters))
parameters = [p for p in model.parameters() if p.requires_grad]
assert parameters
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
model.train()


def step() -> None:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (loss * work.adapters).backward()
    optimizer.step()
    optimizer.zero_grad()


serve(step)
