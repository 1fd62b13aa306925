"""Serving with merged weights on the real engine: texts stay those of unmerged serving while the mix
changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from tests.serving.conftest import ENGINE
from tests.serving.tiny import Exported

PROMPTS = ("ab", "the quick brown fox 12 + 34 = ", "a" * 60, "x = ", "hello there", "0123456789" * 4)
TOKENS = 12


@pytest.fixture(scope="module")
def merging_engine(exported: Exported) -> Iterator[Any]:
    """vLLM that merges, with prefix caching."""
    from vllm import LLM

    from flora_train.serving import manager

    os.environ["FLORA_TRAIN_MERGE"] = "1000"
    try:
        manager.install()
        llm = LLM(str(exported.base), enable_prefix_caching=True, **ENGINE)
        yield llm
        llm.llm_engine.engine_core.shutdown()
    finally:
        del os.environ["FLORA_TRAIN_MERGE"]
        manager.install()


def manager_of(engine: Any) -> Any:
    core = engine.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    return worker.model_runner.lora_manager._adapter_manager


def request(exported: Exported, name: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    if name is None:
        return None
    return LoRARequest(name, 1 + list(exported.folders).index(name), str(exported.folders[name]))


def generate(engine: Any, exported: Exported, rows: list[tuple[str | None, str]]) -> list[str]:
    from vllm import SamplingParams

    outputs = engine.generate(
        [prompt for _, prompt in rows],
        SamplingParams(temperature=0, max_tokens=TOKENS),
        lora_request=[request(exported, name) for name, _ in rows],
        use_tqdm=False,
    )
    return [output.outputs[0].text for output in outputs]


def use_costs(manager: Any, **changes: float) -> None:
    """Costs with which an adapter is merged after one step and unmerged after a step at a loss."""
    from flora_train.serving.merge_policy import MergeCosts

    costs = replace(MergeCosts(1e-9, 1e-9, 1.0, 1.0, 0.5, 2.0), **changes)
    manager.policy.costs_of = lambda lora_id: costs
    manager.costs_of = manager.policy.costs_of
    manager.policy.patience = 1


def base_weights(manager: Any) -> dict[str, tuple[Any, ...]]:
    """What computes the products of the base model: objects, memory and results."""
    state = {}
    for name, layer in manager.modules.items():
        base = getattr(layer, "base_layer", None)
        if hasattr(layer, "full_weight"):
            x = torch.linspace(-1, 1, 3 * layer.input_size).view(3, -1)
            address = base.weight.data_ptr()
            state[name] = id(base), id(getattr(base, "cpu_linear", None)), address, layer._product(x).clone()
    assert state
    return state


def assert_same(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> None:
    assert before.keys() == after.keys()
    for name, (*identities, products) in before.items():
        assert list(after[name][:-1]) == identities, name
        assert torch.equal(after[name][-1], products), name


@pytest.fixture
def merges(merging_engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, str]]:
    """The adapter that is merged in each step, and which rows use it: all, some or none."""
    manager, steps = manager_of(merging_engine), []
    mapped = type(manager).set_adapter_mapping

    def observed(self: Any, mapping: Any) -> None:
        mapped(self, mapping)
        rows = self.batch.merged
        used = "none"
        if rows is not None:
            used = "all" if rows.positions is None else "some"
        steps.append((self.merged, used))

    monkeypatch.setattr(type(manager), "set_adapter_mapping", observed)
    monkeypatch.setattr(manager, "costs_of", manager.costs_of)
    monkeypatch.setattr(manager.policy, "costs_of", manager.policy.costs_of)
    return steps


def test_measured_costs_are_of_this_machine(
    merging_engine: Any, exported: Exported, merges: list[tuple[int | None, str]]
) -> None:
    manager = manager_of(merging_engine)
    for name in exported.folders:
        rows = [(name, prompt) for prompt in PROMPTS]
        assert generate(merging_engine, exported, rows) == [exported.greedy(*row, TOKENS) for row in rows]
    assert len(manager._costs) >= 5
    for costs in manager._costs.values():
        assert costs.merge_seconds > 0
        assert costs.saved_per_row >= 0
        assert costs.foreign_per_step >= 0


@pytest.mark.parametrize("foreign", [0.5, 1000.0])
def test_every_method_gives_its_texts_merged(
    merging_engine: Any, exported: Exported, merges: list[tuple[int | None, str]], foreign: float
) -> None:
    """Alone, and beside other adapters and the base: through merged weights, or (at a loss) without them."""
    manager = manager_of(merging_engine)
    before = base_weights(manager)
    use_costs(manager, foreign_per_step=foreign)
    seen: set[int] = set()
    for name in exported.folders:
        merges.clear()
        rows: list[tuple[str | None, str]] = [(name, prompt) for prompt in PROMPTS]
        assert generate(merging_engine, exported, rows) == [exported.greedy(*row, TOKENS) for row in rows]
        [lora_id] = {merged for merged, used in merges if used == "all"}
        assert lora_id in manager.lora_index_to_id
        assert lora_id not in seen
        seen.add(lora_id)
        others = [other for other in (None, *exported.folders) if other != name][:3]
        rows += [(other, prompt) for other, prompt in zip(others, PROMPTS, strict=False)]
        assert generate(merging_engine, exported, rows) == [exported.greedy(*row, TOKENS) for row in rows]
        assert ((lora_id, "some") in merges) == (foreign < 1)
    assert_same(before, base_weights(manager))


def test_texts_stay_equal_while_the_mix_changes(
    merging_engine: Any, exported: Exported, merges: list[tuple[int | None, str]]
) -> None:
    """Random mixes in which the dominating adapter changes; prompts repeat, so that prefixes are cached by
    merged and unmerged steps for each other."""
    manager, random = manager_of(merging_engine), Random(0)
    before = base_weights(manager)
    use_costs(manager, merge_seconds=5.0)
    names: list[str | None] = [None, *exported.folders]
    expected = {(name, prompt): exported.greedy(name, prompt, TOKENS) for name in names for prompt in PROMPTS}
    switches = manager.policy.switches
    for _ in range(12):
        dominating, other, third = random.choice(list(exported.folders)), random.choice(names), names[0]
        mix = random.choice([(8, 1, 1), (1, 0, 0), (2, 1, 1), (0, 1, 1)])
        rows = [
            (random.choices([dominating, other, third], mix)[0], random.choice(PROMPTS)) for _ in range(12)
        ]
        assert generate(merging_engine, exported, rows) == [expected[row] for row in rows]
    assert manager.policy.switches >= switches + 4
    assert {used for _, used in merges} == {"all", "some", "none"}
    assert_same(before, base_weights(manager))


def test_an_unloaded_adapter_is_unmerged(
    merging_engine: Any, exported: Exported, merges: list[tuple[int | None, str]]
) -> None:
    manager = manager_of(merging_engine)
    use_costs(manager)
    name = next(name for name in exported.folders if "residual" in name)
    generate(merging_engine, exported, [(name, prompt) for prompt in PROMPTS])
    lora_id = manager.merged
    assert lora_id is not None
    merged = [layer.merged for layer in manager.modules.values() if getattr(layer, "merged", None)]
    assert merged
    merging_engine.llm_engine.remove_lora(lora_id)
    assert manager.merged is None
    assert not any(getattr(layer, "merged", None) for layer in manager.modules.values())
    rows = [(name, PROMPTS[0]), (None, PROMPTS[0])]
    assert generate(merging_engine, exported, rows) == [exported.greedy(*row, TOKENS) for row in rows]


def test_merging_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from flora_train.config.errors import UserError
    from flora_train.serving.manager import MultiplicativeManager, _manager_class
    from flora_train.serving.merging_manager import MergingManager

    monkeypatch.delenv("FLORA_TRAIN_MERGE", raising=False)
    assert _manager_class() is MultiplicativeManager
    monkeypatch.setenv("FLORA_TRAIN_MERGE", "0")
    assert _manager_class() is MultiplicativeManager
    monkeypatch.setenv("FLORA_TRAIN_MERGE", "32")
    assert _manager_class() is MergingManager
    for wrong in ("yes", "-1", ""):
        monkeypatch.setenv("FLORA_TRAIN_MERGE", wrong)
        with pytest.raises(UserError, match="FLORA_TRAIN_MERGE"):
            _manager_class()
