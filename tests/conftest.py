"""Adapter specs shared by the tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.triton_device import DEVICE

# isort: split
from flora_train.adapters.spec import AdapterSpec, make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.kernels.backend import use_backend
from flora_train.models import loading as base_model
from flora_train.runtime.logging import init_logging, stop_logging

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell starts what it puts into the background: Ctrl-C is tested there, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "quick", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("longer", max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("attack", max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("quick")


def at_most(examples: int) -> settings:
    """Settings of an expensive property: in make test, no more examples than these; in the longer profiles,
    as many as of any other."""
    is_quick = settings.get_current_profile_name() == "quick"
    return settings(max_examples=examples) if is_quick else settings()


FEW = ("llama", "gpt2", "opt", "phi")
"""Architectures that most tests are content with: Linear with and without bias, Conv1D, grouped and plain
attention."""


def spec(
    method: str, task: str = "task", family: str | None = None, steps: int = 100, **options: Any
) -> AdapterSpec:
    """An adapter with defaults for tests."""
    adapter = AdapterConfig(method=method, **{"lr": 1e-2, "lr_schedule": "constant", **options})
    return make_spec(task, family or method, adapter, default_steps=steps)


def mixed_specs(**options: Any) -> list[AdapterSpec]:
    """Seven adapters: every method, fLoRA in both variants, two ranks of fLoRA and LoRA, a target set of its
    own, and a DoRA whose rank and scale differ between modules."""
    return [
        spec("flora", "a", "flora", rank=3, variant="residual", **options),
        spec("flora", "b", "flora_one", rank=1, variant="pure", **options),
        spec("flora", "c", "pure", rank=3, variant="pure", **options),
        spec("lora", "a", "lora", rank=4, **options),
        spec("lora", "b", "lora_some", rank=2, target_modules=["q_proj", "down_proj"], **options),
        spec(
            "dora", "c", "dora", rank=2, rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 1.0}, **options
        ),
        spec("ia3", "a", "ia3", **options),
    ]


def perturb(bank: Any, scale: float = 0.2) -> None:
    """Move every adapter away from the identity, as training would."""
    generator = torch.Generator().manual_seed(1)
    for pool in bank.pools:
        pool.values.add_(torch.randn(pool.values.shape, generator=generator).to(pool.values), alpha=scale)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Tiny matrices gain nothing from a second thread, and tests run two at a time. Before any fixture, of
    modules, too: other threads are other sums."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _every_machine_is_alike() -> Iterator[None]:
    """`model.dtype=auto` is float32, whatever this CPU multiplies fast; `auto_dtype` asks for both
    answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "multiplies_bfloat16_fast", lambda device: False)
        yield


@pytest.fixture(params=["float32", "bfloat16"])
def auto_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What `model.dtype=auto` is in this process: each test runs once as on a machine that multiplies
    bfloat16 fast, and once as on one that does not."""
    monkeypatch.setattr(base_model, "multiplies_bfloat16_fast", lambda device: request.param == "bfloat16")
    return getattr(torch, request.param)


@pytest.fixture
def log_to_stderr() -> Iterator[None]:
    """Log lines are printed on standard error, as by the command line."""
    init_logging()
    yield
    stop_logging()


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Our own kernels for everything: compiled on a GPU, interpreted elsewhere."""
    use_backend("triton", DEVICE)
    yield
    use_backend("auto", DEVICE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-docs", action="store_true", help="write the tables in docs/ instead of comparing them"
    )
    parser.addoption(
        "--first-of-module", action="store_true", help="run the first selected test of each module"
    )


LONGEST = (
    "test_run",
    "test_launch",
    "test_resume",
    "test_speech",
    "test_compiled_kernels",
    "test_isolation_triton",
    "test_speech_isolation",
    "test_starter",
    "test_toolchain_cache",
)
"""Modules with tests of many seconds. They run first, so that the work that is left at the end can be divided
evenly."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    leave_to_test_full(items, complete=not any("::" in argument for argument in config.args))
    yield  # pytest deselects by -m and -k
    if config.getoption("--first-of-module"):
        first = [next(members) for _, members in groupby(items, key=lambda item: item.path)]
        config.hook.pytest_deselected(items=[item for item in items if item not in first])
        items[:] = first
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def leave_to_test_full(items: list[pytest.Item], complete: bool) -> None:
    """Mark the cases of a test that `@pytest.mark.quick(*ids)` does not name with `full`.

    complete: whether all cases were collected, so that a name without a case is a mistake.
    """
    unused: dict[str, set[str]] = {}
    for item in items:
        marker = item.get_closest_marker("quick")
        if marker is None:
            continue
        test = item.nodeid.partition("[")[0]
        case = item.nodeid.partition("[")[2].removesuffix("]")
        unused.setdefault(test, set(marker.args)).discard(case)
        if case not in marker.args:
            item.add_marker(pytest.mark.full)
    mistakes = [f"{test} has no case {name!r}" for test, names in unused.items() for name in sorted(names)]
    if complete and mistakes:
        raise pytest.UsageError("\n".join(mistakes))


@pytest.fixture
def update_docs(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compare a document with what a test found, or under --update-docs write it."""

    def update(path: Path, content: str) -> None:
        if request.config.getoption("--update-docs"):
            path.write_text(content, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run this test with --update-docs"
        assert path.read_text(encoding="utf-8") == content, (
            f"{path} is out of step: run this test with --update-docs"
        )

    return update
