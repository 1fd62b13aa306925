"""flora_train: all adapters in one batch.

Methods: lora, lora5 (on the layers that AdapterHub adapts), flora, mixed (LoRA, fLoRA and IA3 in turn).
"""

from __future__ import annotations

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import torch

from benchmarks.contenders.workload import LEARNING_RATE, RANK, TARGETS, load_model, make_batch, parse, serve
from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.training_schema import TrainingConfig
from flora_train.data.batch import MixedBatch
from flora_train.training.loss import RowLosses
from flora_train.training.optimizer import BankOptimizer

work = parse()
model = load_model(work)
methods = ["lora", "flora", "ia3"] if work.method == "mixed" else [work.method.removesuffix("5")]
targets = (
    [name for name in TARGETS if name not in ("o_proj", "gate_proj")] if work.method == "lora5" else TARGETS
)
specs = []
for i, name in enumerate(work.names):
    method = methods[i % len(methods)]
    options = {"rank": RANK[method], "target_modules": targets} if method in RANK else {}
    specs.append(
        make_spec(name, method, AdapterConfig(method=method, lr=LEARNING_RATE, **options), default_steps=1000)
    )
bank = AdapterBank.attach(model, specs)
model.train()
row_losses, optimizer = RowLosses(model), BankOptimizer(bank, TrainingConfig(steps=1000))
ids = make_batch(work, model.config.vocab_size)
owners = torch.arange(work.adapters).repeat_interleave(work.rows_each)
batch = MixedBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, owners, ())
share = 1.0 / (work.rows_each * (work.length - 1))


def step() -> None:
    bank.route(batch.adapter_ids)
    (row_losses(batch) * share).sum().backward()
    optimizer.step(range(work.adapters))


serve(step)
