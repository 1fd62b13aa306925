"""-log p of many rows, without gradients, shared by all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.data.batch import Collate, Row, group_by_length, share_of_rank
from flora_train.data.token_split import TokenSplit
from flora_train.models.loading import set_mode
from flora_train.runtime.distributed import is_main_process, sum_over_processes, world
from flora_train.training.fsdp import run_dummy_passes
from flora_train.training.loss import RowLosses
from flora_train.training.preference_rows import row_key
from flora_train.training.result_log import BatchResults, ResultLog


@torch.no_grad()
def compute_nats(
    row_losses: RowLosses,
    bank: AdapterBank,
    rows: Sequence[Row],
    split_of: Callable[[str], TokenSplit],
    *,
    max_tokens: int,
    pad_token: int,
    collate: Collate,
    report: Callable[[float], None] = lambda share: None,
    log: ResultLog | None = None,
) -> NDArray[np.float64]:
    """-log p of the learnt tokens of each of these rows, [n], the same on every process. Collective.

    max_tokens: padded tokens per forward pass; report: called with the share done; log: batches in it are not
    computed again, in which no two rows may have the same `row_key`. Afterwards the model is routed to the
    plain base.
    """
    places = {row: place for place, row in enumerate(rows)}
    batches: list[list[Row]] = []
    for block in bank.blocks(row.adapter for row in rows):
        batches += group_by_length([row for row in rows if row.adapter in block], max_tokens)
    known = {} if log is None else log.known(batches)
    unknown = [batch for batch in batches if row_key(batch[0]) not in known]
    share = share_of_rank(unknown, *world())
    nats = torch.zeros(len(rows), dtype=torch.float64, device=bank.device)
    if is_main_process():  # one process adds known losses, as all are summed
        for batch in batches:
            if row_key(batch[0]) in known:
                losses = known[row_key(batch[0])].losses
                nats[[places[row] for row in batch]] = nats.new_tensor(losses)
    training = row_losses.model.training
    row_losses.model.eval()
    try:
        for done, batch in enumerate(share, start=1):
            inputs = collate(batch, split_of, pad_token).to(bank.device)
            with bank.routed(inputs.adapter_ids):
                computed = row_losses(inputs).double()
            nats[[places[row] for row in batch]] = computed
            if log is not None:
                log.add(batch, BatchResults(computed.tolist()))
            report(done / len(share))
        run_dummy_passes(row_losses, bank, unknown)
    finally:
        bank.abandon()
        set_mode(row_losses.model, training)
    return sum_over_processes(nats).cpu().numpy()
