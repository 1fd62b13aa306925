"""Compares what vLLM answers with the trainer's bank and with plain PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import flora_train.peft_plugin  # noqa: F401  (PEFT then loads a FLORA)
from flora_train.adapters.spec import BASE_ID
from tests.serving.tiny import Exported

TOLERANCE = 1e-4
"""Of a log-probability in float32."""


@dataclass
class Reference:
    """The log-probabilities of a base model with each of its exported adapters."""

    exported: Exported
    _peft: dict[str | None, Any] = field(default_factory=dict)

    def by_bank(self, name: str | None, ids: list[int]) -> Tensor:
        """[tokens, vocabulary]; None is the base model."""
        bank = self.exported.bank
        adapter = BASE_ID if name is None else bank.ids[name]
        with bank.routed([adapter]), torch.no_grad():
            logits = bank.model(input_ids=torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1)

    def by_peft(self, name: str | None, ids: list[int]) -> Tensor:
        """[tokens, vocabulary], of the exported folder."""
        if name not in self._peft:
            model = AutoModelForCausalLM.from_pretrained(self.exported.base, dtype=torch.float32)
            if name is not None:
                model = PeftModel.from_pretrained(model, self.exported.folders[name])
            self._peft[name] = model.eval()
        with torch.no_grad():
            logits = self._peft[name](input_ids=torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1)

    def worst(self, name: str | None, output: Any) -> float:
        """The largest difference of a log-probability in one answer of vLLM, to the bank or to PEFT.

        Every generated token must also be the most probable one, up to the tolerance.
        """
        prompt, generated = list(output.prompt_token_ids), output.outputs[0]
        tokens = list(generated.token_ids)
        worst = 0.0
        for expected in (self.by_bank(name, prompt + tokens), self.by_peft(name, prompt + tokens)):
            rows = expected[len(prompt) - 1 :]
            for position, token in enumerate(tokens):
                worst = max(worst, float(rows[position].max() - rows[position, token]))
                worst = max(worst, _difference(generated.logprobs[position], rows[position]))
            for position, returned in enumerate(output.prompt_logprobs or []):
                if returned is not None:  # the first token has none
                    worst = max(worst, _difference(returned, expected[position - 1]))
        return worst


def _difference(returned: Any, expected: Tensor) -> float:
    """The largest difference between vLLM's log-probabilities of some tokens and the expected ones of all."""
    return max(abs(value.logprob - float(expected[token])) for token, value in returned.items())
