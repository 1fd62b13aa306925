"""One linear layer with PEFT's HiRA adapters: each adapter is activated in turn, for its own tokens."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import HiraConfig, get_peft_model
from torch import Tensor, nn

_models: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def peft_hira(problem: Any) -> Tensor:
    if problem not in _models:
        _models[problem] = _adapted(problem)
    model = _models[problem]
    layer, parts = model.base_model.model[0], []
    for k, start, end in problem.segments:
        layer.set_adapter(str(k))
        parts.append(layer(problem.x[start:end]))
    return torch.cat(parts)


def _adapted(problem: Any) -> Any:
    base = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    base.weight = nn.Parameter(problem.weight, requires_grad=False)
    config = HiraConfig(r=problem.A.shape[1], target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config, adapter_name="0")  # type: ignore[arg-type]
    for k in range(1, problem.adapters):
        model.add_adapter(str(k), config)
    return model.to(problem.x.device)
