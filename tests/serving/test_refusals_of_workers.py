"""With tensor parallelism, a refusal of all workers leaves the next calls as they were."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.serving.test_adapter_life import FLORA, IA3, LORA, PROMPT, make_wide
from tests.serving.tiny import Exported

SCRIPT = """
import sys
from tests.serving.conftest import ENGINE
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    base, prompt, *folders = sys.argv[1:]
    engine = LLM(base, tensor_parallel_size=2, **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=12)
    for number, folder in enumerate(folders, start=1):
        try:
            request = LoRARequest(folder, number, folder)
            [output] = engine.generate([prompt], params, lora_request=request, use_tqdm=False)
            print("text", repr(output.outputs[0].text))
        except Exception as error:
            print("refused", error)
"""


def test_adapters_after_a_refused_one_are_served(exported: Exported, tmp_path: Path) -> None:
    bad = shutil.copytree(exported.folders[FLORA], tmp_path / "bad")
    make_wide(bad)
    good = [exported.folders[name] for name in (FLORA, IA3, LORA)]
    folders = [bad, good[0], bad, *good]
    words = [sys.executable, "-c", SCRIPT, str(exported.base), PROMPT, *map(str, folders)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("text ", "refused "))]
    assert len(lines) == len(folders), done.stdout[-3000:] + done.stderr[-3000:]
    for line in (lines[0], lines[2]):
        assert "has rank 40, and the limit is 16" in line
    expected = [f"text {exported.greedy(name, PROMPT)!r}" for name in (FLORA, FLORA, IA3, LORA)]
    assert [lines[1], *lines[3:]] == expected
