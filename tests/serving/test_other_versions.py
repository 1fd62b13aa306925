"""In a vLLM that lacks what the plugin changes, LoRA is served as ever, and other adapters are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.serving.tiny import Exported

SCRIPT = """
import sys
from importlib import import_module

module, owner, name = sys.argv[1:4]
vllm_class = getattr(import_module(module), owner)
delattr(vllm_class, name)
from tests.serving.conftest import ENGINE
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    engine = LLM(sys.argv[4], **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=8)
    for number, folder in enumerate([sys.argv[5], sys.argv[6], sys.argv[5]], start=1):
        try:
            request = LoRARequest(folder, number, folder)
            [output] = engine.generate(["abc"], params, lora_request=request, use_tqdm=False)
            print("text", repr(output.outputs[0].text))
        except Exception as error:
            print("refused", error)
"""


@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("vllm.v1.engine.llm_engine", "LLMEngine", "pin_lora"),
        ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", "resolve_lora"),
    ],
)
@pytest.mark.parametrize("method", ["a-residual", "a-ia3", "a-own"])
def test_without_a_seam_lora_is_served_and_others_are_refused(
    exported: Exported, module: str, owner: str, name: str, method: str
) -> None:
    if method != "a-residual" and name != "pin_lora":
        pytest.skip("the refusal does not depend on the seam")
    folders = [str(exported.folders[adapter]) for adapter in (exported.lora, method)]
    words = [sys.executable, "-c", SCRIPT, module, owner, name, str(exported.base), *folders]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("text", "refused"))]
    assert len(lines) == 3, done.stdout[-3000:] + done.stderr[-3000:]
    expected = f"text {exported.greedy(exported.lora, 'abc', 8)!r}"
    assert lines[0] == lines[2] == expected
    assert "is an adapter of type" in lines[1]
    assert "it needs vLLM 0.32, and this is another version" in lines[1]
    assert f"{owner}.{name}" in lines[1]
