"""Tensor parallelism and torch.compile give what one eager process gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.layouts import eight_adapters, save_layout
from tests.serving.reference import Reference
from tests.serving.test_logprobs import Served, prompts, serving
from tests.serving.tiny import export_adapters

MODES: dict[str, dict[str, Any]] = {
    "two processes": {"tensor_parallel_size": 2},
    "compiled": {"enforce_eager": False},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("llama")
    base = save_layout("llama", folder / "base")
    return Reference(export_adapters(base, folder / "adapters", eight_adapters("llama")))


@pytest.fixture(scope="module", params=MODES)
def served(request: pytest.FixtureRequest, reference: Reference) -> Iterator[Served]:
    with serving(reference, **MODES[request.param]) as served:
        yield served


def test_batches_with_and_without_multiplicative_rows_take_turns(served: Served) -> None:
    """LoRA alone, then mixed with fLoRA and IA3, then LoRA again: compiled code is that of LoRA alone."""
    specs = served.reference.exported.bank.specs
    loras: list[str | None] = [spec.name for spec in specs if spec.method == "lora"]
    for seed, names in enumerate([[*loras, None], served.names, [*loras, None], [None], served.names]):
        rows = [(name, prompt) for prompt in prompts((1, 17, 131), seed) for name in names]
        assert served.worst(rows, served.answers(rows)) == {}
