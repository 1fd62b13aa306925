"""Fixtures that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def memory_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel fails to write shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **options: object) -> Tensor:
            made = make(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
