"""What does each adapter write? Greedy completions, all adapters and the base model in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.data.tokens import pad_token, start_tokens


@torch.no_grad()
def complete(
    model: nn.Module, bank: AdapterBank, tokenizer: Any, requests: Sequence[tuple[str, int]], max_new_tokens: int
) -> list[str]:
    """Completions of (prompt, adapter id) requests, in their order; -1 is the base model.

    One left-padded batch with a key-value cache; each row uses its own adapter.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i][1])
    start = start_tokens(tokenizer)  # as in training: no end token after a prompt
    prompts = [start + tokenizer(requests[i][0], add_special_tokens=False)["input_ids"] for i in order]
    longest = max(map(len, prompts))
    pad = pad_token(tokenizer)
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=bank.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=bank.device)
    training = model.training
    model.eval()
    try:
        with bank.routed([requests[i][1] for i in order]):
            generated: Any = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
            )
    finally:
        model.train(training)
    texts = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    completions = dict(zip(order, texts, strict=True))
    return [completions[i] for i in range(len(requests))]
