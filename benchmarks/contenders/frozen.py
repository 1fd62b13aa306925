"""The limit: the frozen model alone, forward and backward to its embeddings, with flora_train's loss and no
adapter."""

from __future__ import annotations

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import torch

from benchmarks.contenders.workload import load_model, make_batch, parse, serve
from flora_train.data.batch import MixedBatch
from flora_train.training.loss import RowLosses

work = parse()
model = load_model(work)
model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
row_losses = RowLosses(model)
ids = make_batch(work, model.config.vocab_size)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
batch = MixedBatch(inputs, ids, torch.zeros(work.rows, dtype=torch.long), ())
serve(lambda: row_losses(batch).sum().backward())
