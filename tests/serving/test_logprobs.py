"""vLLM's log-probabilities and greedy tokens are those of the trainer's bank and of PEFT: eight adapters and
the base in one batch, prompts of 1 to 300 tokens, float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.conftest import ENGINE
from tests.serving.layouts import LAYOUTS, eight_adapters, save_layout
from tests.serving.reference import TOLERANCE, Reference
from tests.serving.tiny import WORDS, export_adapters

LENGTHS = (1, 2, 17, 64, 131, 300)
"""Tokens of the prompts."""
BUDGETS: dict[str, dict[str, Any]] = {
    "whole": {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024},
    "chunked": {"enable_chunked_prefill": True, "max_num_batched_tokens": 48},
}
"""Engines that read a prompt at once, and in parts beside others that generate."""


@dataclass
class Served:
    """An engine, and what it must answer."""

    engine: Any
    reference: Reference

    @property
    def names(self) -> list[str | None]:
        """Every adapter, and None for the base model."""
        return [*self.reference.exported.folders, None]

    def answers(self, rows: Sequence[tuple[str | None, list[int]]], **sampling: Any) -> list[Any]:
        """Eight greedy tokens for each (adapter, prompt), all submitted at once."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        folders = self.reference.exported.folders
        requests = {
            name: LoRARequest(name, number, str(folder))
            for number, (name, folder) in enumerate(folders.items(), start=1)
        }
        outputs: list[Any] = self.engine.generate(
            [{"prompt_token_ids": prompt} for _, prompt in rows],
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3, **sampling),
            lora_request=[None if name is None else requests[name] for name, _ in rows],
            use_tqdm=False,
        )
        return outputs

    def worst(self, rows: Sequence[tuple[str | None, list[int]]], outputs: list[Any]) -> dict[str, float]:
        """Adapter -> largest difference, of those beyond the tolerance."""
        worst: dict[str, float] = {}
        for (name, _), output in zip(rows, outputs, strict=True):
            key = name or "base"
            worst[key] = max(worst.get(key, 0.0), self.reference.worst(name, output))
        return {key: value for key, value in worst.items() if value > TOLERANCE}


def prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, len(WORDS), (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module", params=LAYOUTS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_layout(request.param, folder / "base")
    return Reference(export_adapters(base, folder / "adapters", eight_adapters(request.param)))


@contextmanager
def serving(reference: Reference, **settings: Any) -> Iterator[Served]:
    """An engine in a process of its own, with a slot for each of the eight adapters.

    In this process, vLLM would change classes of transformers that the reference uses.
    """
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        engine = LLM(
            str(reference.exported.base), **{**ENGINE, "max_loras": 8, "max_num_seqs": 12, **settings}
        )
    try:
        yield Served(engine, reference)
    finally:
        engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module", params=BUDGETS)
def served(request: pytest.FixtureRequest, reference: Reference) -> Iterator[Served]:
    with serving(reference, enable_prefix_caching=True, **BUDGETS[request.param]) as served:
        yield served


def test_every_method_in_one_batch(served: Served) -> None:
    rows = [(name, prompt) for prompt in prompts(LENGTHS, 0) for name in served.names]
    outputs = served.answers(rows, prompt_logprobs=1)
    assert served.worst(rows, outputs) == {}
    first_tokens = [output.outputs[0].logprobs[0] for output in outputs[-len(served.names) :]]
    probabilities = {max(value.logprob for value in returned.values()) for returned in first_tokens}
    assert len(probabilities) == len(served.names)  # every adapter changes what is computed


def test_adapters_share_no_cached_prefix(served: Served) -> None:
    [prompt] = prompts([300], 1)
    first = [(name, prompt) for name in served.names]
    assert served.worst(first, served.answers(first)) == {}
    again = list(reversed(first))
    outputs = served.answers(again)
    assert all(output.num_cached_tokens >= 128 for output in outputs)  # each its own
    assert served.worst(again, outputs) == {}


def test_bfloat16_rounds_the_same_numbers(tmp_path: Path) -> None:
    """In bfloat16, a prompt's weights are formed beside the base model's product, as in no other format. The
    answers are as exact as the base model's: LoRA, which vLLM computes, has larger differences here."""
    base = save_layout("llama", tmp_path / "base")
    reference = Reference(export_adapters(base, tmp_path / "adapters", eight_adapters("llama")))
    with serving(reference, dtype="bfloat16", **BUDGETS["whole"]) as served:
        rows = [(name, prompt) for prompt in prompts((17, 131, 300), 0) for name in served.names]
        outputs = served.answers(rows, prompt_logprobs=1)
    errors: dict[str | None, float] = {}
    for (name, _), output in zip(rows, outputs, strict=True):
        errors[name] = max(errors.get(name, 0.0), reference.worst(name, output))
    ours = {name: error for name, error in errors.items() if name is None or "lora" not in name}
    assert len(ours) == 7
    assert max(ours.values()) < 2.5 * errors[None], errors
