"""A short test of vLLM that `.ci/run` runs, beside one case of test_logprobs.py: the base and adapters mixed
in one batch, as the trainer's bank computes them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.serving.tiny import Exported

PROMPTS = ("ab", "the quick brown fox 12 + 34 = ")


def test_base_and_adapters_in_one_batch_give_the_texts_of_the_bank(engine: Any, exported: Exported) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    names = [None, *exported.folders]
    requests = {
        name: LoRARequest(name, number, str(exported.folders[name]))
        for number, name in enumerate(names, start=1)
        if name is not None
    }
    rows = [(name, prompt) for prompt in PROMPTS for name in names]
    outputs = engine.generate(
        [prompt for _, prompt in rows],
        SamplingParams(temperature=0, max_tokens=12),
        lora_request=[requests.get(name) for name, _ in rows],
        use_tqdm=False,
    )
    texts = [output.outputs[0].text for output in outputs]
    assert texts == [exported.greedy(name, prompt) for name, prompt in rows]
    by_name = {name: tuple(texts[i] for i, row in enumerate(rows) if row[0] == name) for name in names}
    assert len(set(by_name.values())) == len(names)


def test_the_environment_has_the_pinned_versions() -> None:
    pins = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    for line in pins:
        name, separator, pinned = line.partition(";")[0].strip().partition("==")
        if separator and not line.startswith("#") and "machine" not in line:
            assert version(name).partition("+")[0] == pinned.partition("+")[0], name
