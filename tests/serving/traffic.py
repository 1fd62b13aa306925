"""Requests of several clients on an engine of this process, step by step, and what each client was given."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serving.conftest import ENGINE
from tests.serving.tiny import Exported


def stock_async() -> type:
    """vLLM's asynchronous scheduler, on a CPU.

    vLLM turns asynchronous scheduling off on a CPU, because nothing runs beside the scheduler there. The
    engine can do it all the same: it schedules a step before it has read the tokens of the one before it.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    class StockAsync(AsyncScheduler):
        def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
            vllm_config.scheduler_config.async_scheduling = True
            super().__init__(vllm_config, *args, **options)

    return StockAsync


def stock() -> type:
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler


def fair() -> type:
    from flora_train.serving.fair_scheduler import FairScheduler

    return FairScheduler


def fair_async() -> Any:
    """What FairScheduler becomes where asynchronous scheduling is on."""
    from flora_train.serving.fair_scheduler import FairScheduler

    def make(vllm_config: Any, *args: Any, **options: Any) -> Any:
        vllm_config.scheduler_config.async_scheduling = True
        return FairScheduler(vllm_config, *args, **options)

    return type("FairAsync", (), {"__new__": lambda cls, *args, **options: make(*args, **options)})


SCHEDULERS = {"stock": stock, "stock async": stock_async, "fair": fair, "fair async": fair_async}


@contextmanager
def engine(base: Path, scheduler: str, **options: Any) -> Iterator[Any]:
    """An engine of this process with one of the schedulers."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    settings = {**ENGINE, "enable_prefix_caching": False, "scheduler_cls": SCHEDULERS[scheduler](), **options}
    llm = LLM(str(base), **settings)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@dataclass
class Traffic:
    """Requests on an engine. A client is the name of an adapter, None the base."""

    llm: Any
    exported: Exported
    sent: dict[str, tuple[str | None, int]] = field(default_factory=dict)
    """Request -> its client and the length of its prompt."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    charges: Counter[str] = field(default_factory=Counter)
    """Request -> what the scheduler charged it."""
    leads: list[dict[str | None, float]] = field(default_factory=list)
    """What each client was given until the end of each step, by the outputs."""
    given: Counter[str | None] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    """Requests, as they gave their first tokens."""
    preemptions: int = 0
    victims: list[tuple[int, float, float]] = field(default_factory=list)
    """Step, counter of the client of a preempted request, and the largest counter of those that go on."""

    def __post_init__(self) -> None:
        scheduler = self.scheduler
        if hasattr(scheduler, "fair"):
            charged = scheduler._charged

            def record(request: Any, charge: float) -> None:
                self.charges[request.request_id] += charge
                charged(request, charge)

            scheduler._charged = record
            scheduler.waiting._on_charge = record
        preempt = scheduler._preempt_request

        def count(request: Any, *args: Any, **options: Any) -> None:
            if hasattr(scheduler, "fair"):
                rest = [scheduler._counter(other) for other in scheduler.running]
                self.victims.append((len(self.leads), scheduler._counter(request), max(rest, default=0.0)))
            self.preemptions += 1
            preempt(request, *args, **options)

        scheduler._preempt_request = count

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def internal(self, identifier: str) -> str:
        """The engine's own id of a request."""
        [name] = [name for name in self.charges if name.startswith(f"{identifier}-")]
        return name

    def send(
        self, client: str | None, prompt: int, output: int, *, count: int = 1, regex: str | None = None
    ) -> list[str]:
        """Send requests of a client; returns their ids."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        names = list(self.exported.folders)
        adapter = None
        if client is not None:
            adapter = LoRARequest(client, 1 + names.index(client), str(self.exported.folders[client]))
        ids = []
        for _ in range(count):
            number = len(self.sent)
            text = [3 + (number * 7 + place * (number + 3)) % 26 for place in range(prompt)]
            params = SamplingParams(
                temperature=0,
                max_tokens=output,
                ignore_eos=regex is None,
                output_kind=RequestOutputKind.DELTA,
                structured_outputs=None if regex is None else StructuredOutputsParams(regex=regex),
            )
            identifier = f"{client}-{number}"
            self.llm.llm_engine.add_request(
                identifier, {"prompt_token_ids": text}, params, lora_request=adapter
            )
            self.sent[identifier] = (client, prompt)
            self.tokens[identifier] = []
            ids.append(identifier)
        return ids

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            client, prompt = self.sent[output.request_id]
            new = list(output.outputs[0].token_ids)
            if new and not self.tokens[output.request_id]:
                self.given[client] += prompt
                self.order.append(output.request_id)
            self.given[client] += 2 * len(new)
            self.tokens[output.request_id] += new
        self.leads.append(dict(self.given))

    def run(self, steps: int | None = None) -> None:
        """Run until nothing is left, or a number of steps."""
        done = 0
        while self.llm.llm_engine.has_unfinished_requests() and (steps is None or done < steps):
            self.step()
            done += 1

    def abort(self, *ids: str) -> None:
        self.llm.llm_engine.abort_request(list(ids))

    def waiting(self, client: str | None) -> int:
        name = "None" if client is None else client
        return sum(request.request_id.startswith(f"{name}-") for request in self.scheduler.waiting)
