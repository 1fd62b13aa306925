"""FairScheduler: vLLM's scheduler with a waiting queue that is fair to clients.

`vllm serve ... --scheduler-cls flora_train.serving.fair_scheduler.FairScheduler`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from flora_train.config.errors import user_error
from flora_train.serving.client_identity import create_secret, marked_client, secret
from flora_train.serving.fair_queue import FairQueue
from flora_train.serving.fairness import BASE_CLIENT, adapter_client, check_policy, is_adapter, load_settings
from flora_train.serving.served_adapters import client_name
from flora_train.serving.slot_turns import SlotTurns

logger = logging.getLogger(__name__)


class FairRequestQueue(RequestQueue):
    """vLLM's interface of a waiting queue, over a FairQueue.

    vLLM takes a request from the queue both to run it and to skip it in this step. Which of the two it was is
    known from the request's status, when vLLM next looks at the queue.
    """

    def __init__(
        self,
        fair: FairQueue[Request],
        client_of: Callable[[Request], Hashable],
        *,
        on_charge: Callable[[Request, float], None],
        on_skip: Callable[[Request], None],
    ) -> None:
        self._fair = fair
        self._client_of = client_of
        self._on_charge = on_charge
        self._on_skip = on_skip
        self._taken: Request | None = None
        self._aside: set[Request] = set()
        self.skipped: list[Request] = []
        """Requests that were skipped in this step, in order."""

    def add_request(self, request: Request) -> None:
        self._fair.add(request, self._client_of(request))

    def peek_request(self) -> Request:
        self.settle()
        return self._fair.head()

    def pop_request(self) -> Request:
        self.settle()
        self._taken = self._fair.take()
        return self._taken

    def prepend_request(self, request: Request) -> None:
        """Put a preempted request before the others of its client."""
        self._fair.add_first(request, self._client_of(request))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests that were skipped back. The last of them comes first, as in vLLM's own queues."""
        self.settle()
        self._fair.widen()
        returned = list(requests)
        returned.reverse()
        self._aside.difference_update(returned)
        self._fair.put_back(returned)

    def remove_request(self, request: Request) -> None:
        self._fair.remove(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._fair.remove(request)

    def settle(self) -> None:
        """Charge the request that was taken last, or note that it was skipped."""
        request, self._taken = self._taken, None
        if request is None:
            return
        if request.status != RequestStatus.RUNNING:
            self.skipped.append(request)
            self._aside.add(request)
            self._on_skip(request)
            return
        cached = request.num_computed_tokens
        self._on_charge(request, self._fair.admit(request, request.num_prompt_tokens, cached=cached))

    def end_step(self) -> None:
        """Release the requests that were taken and wait in another queue now."""
        self._fair.widen()
        for request in self._aside:
            self._fair.release(request)
        self._aside.clear()
        self.skipped.clear()

    def __bool__(self) -> bool:
        return len(self) > 0

    def __len__(self) -> int:
        # a request that was skipped may narrow the queue
        self.settle()
        return len(self._fair)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._fair)


class FairScheduler(Scheduler):
    """Serves the queued client with the least virtual token counter first.

    With asynchronous scheduling, which vLLM uses where it can, an AsyncFairScheduler is made.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **options: Any) -> FairScheduler:
        if cls is FairScheduler and vllm_config.scheduler_config.async_scheduling:
            cls = AsyncFairScheduler
        scheduler: FairScheduler = super().__new__(cls)
        return scheduler

    def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
        check_configuration(vllm_config)
        super().__init__(vllm_config, *args, **options)
        create_secret()
        settings = load_settings()
        weights = settings.weights_by_client()
        self._secret = secret()
        self.fair: FairQueue[Request] = FairQueue(
            lambda client: weights.get(client, settings.default_weight),
            settings.token_prices(),
            most_idle=settings.most_idle_clients,
        )
        self.slot_turns: SlotTurns[Request] = SlotTurns(settings.slot_lead)
        self.waiting = FairRequestQueue(
            self.fair, self.client_of, on_charge=self._charged, on_skip=self._skipped
        )
        logger.info("Fair scheduling by %s, prices %s", type(self).__name__, self.fair.prices)

    def client_of(self, request: Request) -> str:
        """The API key's client where the server's middleware names one, else the adapter."""
        client = marked_client(request.request_id, self._secret)
        if client is not None:
            return client
        if request.lora_request is None:
            return BASE_CLIENT
        return adapter_client(client_name(request.lora_request.lora_name))

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        self._choose_victim()
        output = super().schedule(*args, **options)
        self._find_slot_waiter()
        self.waiting.end_step()
        # requests that waited for keys and values from elsewhere are admitted from a queue of their own
        for data in output.scheduled_new_reqs:
            request = self.requests[data.req_id]
            prompt = request.num_prompt_tokens
            self._charged(request, self.fair.charge_prompt(request, prompt, cached=data.num_computed_tokens))
        return output

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # before the number of computed tokens is more than that of the cached ones
        self.waiting.settle()
        super()._update_after_schedule(scheduler_output)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        token_ids, stopped = super()._update_request_with_output(request, new_token_ids, is_stale=is_stale)
        self._charged(request, self.fair.charge_output(request, len(token_ids)))
        return token_ids, stopped

    def _enqueue_waiting_request(self, request: Request) -> None:
        self.fair.register(request, self.client_of(request))
        super()._enqueue_waiting_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        self.fair.finish(request)
        return super()._free_request(request, delay_free_blocks=delay_free_blocks)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        return super()._handle_blocked_waiting_request(request) and not self._gives_way(request)

    def _choose_victim(self) -> None:
        """Where the cache may be full in this step, let the client that is furthest ahead lose its place.

        vLLM preempts the last running request.
        """
        if len(self.running) < 2:
            return
        blocks = len(self.running) + self.max_num_scheduled_tokens // self.block_size
        if self.kv_cache_manager.block_pool.get_num_free_blocks() > blocks:
            return
        counters = [self._counter(request) for request in self.running]
        ahead = max(counters)
        last = max(index for index, counter in enumerate(counters) if counter == ahead)
        self.running.append(self.running.pop(last))

    def _find_slot_waiter(self) -> None:
        """Note which request of a client that is behind waits for one of the slots of adapters."""
        turns = self.slot_turns
        if turns.waiting is not None and not self._waits(turns.waiting):
            turns.done()
        if turns.waiting is not None or not self.waiting.skipped or self.lora_config is None:
            return
        slots = self._full_slots()
        for request in self.waiting.skipped:
            if self._lacks_slot(request, slots):
                turns.wait(request)
                return

    def _full_slots(self) -> dict[int, str] | None:
        """Adapters of running requests, number and client's name; None while a slot is free."""
        slots = {}
        for request in self.running:
            if request.lora_request is not None:
                slots[request.lora_request.lora_int_id] = client_name(request.lora_request.lora_name)
        if self.lora_config is None or len(slots) < self.lora_config.max_loras:
            return None
        return slots

    def _lacks_slot(self, request: Request, slots: dict[int, str] | None) -> bool:
        adapter = request.lora_request
        if slots is None or adapter is None or adapter.lora_int_id in slots:
            return False
        return self._waits(request)

    def _skipped(self, request: Request) -> None:
        """Once a request was skipped because its adapter has no slot, pass over the others all at once."""
        if request.lora_request is None:
            return
        if self._gives_way(request):
            given_way = self.fair.client_of(request)
            self.fair.narrow(lambda client: client != given_way or not is_adapter(client))
        slots = self._full_slots()
        if slots is not None and self._lacks_slot(request, slots):
            loaded = {adapter_client(name) for name in slots.values()}
            self.fair.narrow(lambda client: client in loaded or not is_adapter(client))

    def _waits(self, request: Request) -> bool:
        return request in self.fair and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)

    def _gives_way(self, request: Request) -> bool:
        """Whether a request's adapter has had its lead over one that waits for a slot."""
        waiting = self.slot_turns.waiting
        if waiting is None or request is waiting or request.lora_request is None:
            return False
        if request.status == RequestStatus.PREEMPTED:
            return False
        if not self.slot_turns.used_up(request.lora_request.lora_int_id):
            return False
        return self._counter(request) >= self._counter(waiting)

    def _charged(self, request: Request, charge: float) -> None:
        waiting = self.slot_turns.waiting
        if waiting is None or request.lora_request is None or waiting not in self.fair:
            return
        if self._counter(request) > self._counter(waiting) or self._same_client(request, waiting):
            self.slot_turns.serve(request.lora_request.lora_int_id, charge)

    def _same_client(self, one: Request, other: Request) -> bool:
        return self.fair.client_of(one) == self.fair.client_of(other)

    def _counter(self, request: Request) -> float:
        return self.fair.counter(self.fair.client_of(request))


class AsyncFairScheduler(FairScheduler, AsyncScheduler):
    """FairScheduler for asynchronous scheduling: a step is scheduled while the one before it runs."""


def check_configuration(vllm_config: Any) -> None:
    """Raises UserError for settings of vLLM that contradict fair scheduling."""
    check_policy(vllm_config.scheduler_config.policy)
    if vllm_config.model_config.is_diffusion:
        raise user_error(
            "--scheduler-cls", "FairScheduler", "diffusion models need vLLM's own scheduler: leave this out"
        )
