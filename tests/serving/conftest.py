"""Tests of this folder start vLLM, run in its environment, and are marked `serving`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.serving.tiny import Exported, export_adapters, save_base

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is half of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine of this process; servers have processes of their own
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

ENGINE = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 4,
    "max_lora_rank": 16,
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
}
"""Settings of engines that the tests start: more adapters than slots, so that adapters change places."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("serving")


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    if find_spec("vllm") is None:
        pytest.fail("vLLM is not installed: make test-serving runs these tests in .venv-serving")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny base and an adapter of every method."""
    folder = tmp_path_factory.mktemp("exported")
    return export_adapters(save_base(folder / "base"), folder / "adapters")


@pytest.fixture(scope="module")
def engine(exported: Exported) -> Iterator[object]:
    """vLLM with the tiny base. It takes ten seconds, so that a module has one."""
    from vllm import LLM

    llm = LLM(str(exported.base), **ENGINE)
    yield llm
    llm.llm_engine.engine_core.shutdown()
