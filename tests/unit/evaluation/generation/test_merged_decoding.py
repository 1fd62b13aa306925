"""A batch of one adapter that is decoded with merged weights gives the texts and log-probabilities of the
adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.merged import (
    MergedWeights,
    merge_layer,
    mergeable_modules,
    routed_merged,
)
from flora_train.adapters.paging import Paging
from flora_train.adapters.routing import MergedLayer
from flora_train.config.model_schema import ModelConfig
from flora_train.evaluation.generation import Decoder, Generated, MergedDecoding, Request, Sampling
from flora_train.evaluation.generation import merged_decoding as module_under_test
from flora_train.evaluation.generation.merge_costs import LayerCosts, measure_layers
from flora_train.evaluation.generation.merged_decoding import worthwhile
from flora_train.evaluation.generation.requests import Row
from flora_train.models.loading import load_base_model, load_tokenizer
from flora_train.training.fsdp import apply_fsdp
from tests.architectures import ARCHITECTURES
from tests.conftest import spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.generation.test_complete import PROMPTS, model_for
from tests.unit.models.test_quantized import Int8Linear

CAUSAL = [name for name in ARCHITECTURES if name not in ("t5", "whisper")]
OWN_LINEAR = ("falcon",)
"""Architectures with a class of linear layers of their own, which are not merged."""
GREEDY, WARM = Sampling(0.0, 1.0, 0), Sampling(1.0, 0.95, 3)
SMOLLM2 = Path(__file__).resolve().parents[4] / "assets" / "models" / "smollm2-135m"
METHODS = ("flora", "pure", "lora", "dora", "ia3")


def bank_for(architecture: str = "llama", paging: Paging | None = None) -> AdapterBank:
    """One adapter of each of METHODS; IA3 scales outputs, and inputs where PEFT's default does."""
    specs = [
        spec("flora", rank=2, variant="residual"),
        spec("flora", family="pure", rank=2, variant="pure"),
        spec("lora", rank=2),
        spec("dora", rank=2),
        spec("ia3", target_modules="all-linear", feedforward_modules=[]),
    ]
    bank = AdapterBank.attach(model_for(architecture, byte_tokenizer()), specs, paging=paging)
    for adapter in range(len(specs)):
        row = bank.row(adapter)
        row += 0.1 * torch.randn(row.shape, generator=torch.Generator().manual_seed(adapter))
    bank.model.eval()
    return bank


def merged_weights(bank: AdapterBank, adapter: int) -> MergedWeights:
    """All layers merged, whatever that costs."""
    with torch.no_grad(), bank.routed([adapter]):
        layers = {name: merge_layer(bank, adapter, name) for name in mergeable_modules(bank, adapter)}
    return MergedWeights(adapter, layers)


class AlwaysMerged(MergedDecoding):
    """Merges each adapter as soon as a batch is its own."""

    def _costs_of(self, adapter: int, rows: int) -> list[LayerCosts]:
        self.rows = rows
        return [LayerCosts(tuple(mergeable_modules(self.bank, adapter)), 0.0, 1.0, 1)]

    def expected_tokens(self, done: int, limit: int) -> float:
        return float(limit)


def decode(
    bank: AdapterBank,
    requests: list[Request],
    sampling: Sampling = GREEDY,
    *,
    merging: MergedDecoding | None = None,
    rows: int = 32,
    tokens: int = 12,
) -> dict[tuple[int, int], str]:
    texts: dict[tuple[int, int], str] = {}

    def store(generated: Generated) -> None:
        texts[generated.request, generated.sample] = generated.text

    decoder = Decoder(
        bank.model,
        byte_tokenizer(),
        bank.routed,
        sampling=sampling,
        max_new_tokens=tokens,
        max_rows=rows,
        blocks=bank.blocks,
        merging=merging,
    )
    decoder.run(requests, store)
    return texts


def base_weights(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, value in model.named_parameters():
        address, bits = before[name]
        assert value.data_ptr() == address, name
        assert torch.equal(value, bits), name


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.quick("llama", "gpt2", "opt", "phi")
def test_merged_log_probabilities_equal_those_of_each_method(architecture: str) -> None:
    bank = bank_for(architecture)
    before = base_weights(bank.model)
    ids = torch.randint(1, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), bank.routed([-1, -1, -1]):
        base = bank.model(ids, use_cache=False).logits.log_softmax(-1)
    for adapter, method in enumerate(METHODS):
        merged = merged_weights(bank, adapter)
        if architecture in OWN_LINEAR:
            assert merged.layers == {}
            continue
        assert merged.layers.keys() == bank.location[adapter][0].targets.keys()
        with torch.no_grad():
            with bank.routed([adapter] * 3):
                expected = bank.model(ids, use_cache=False).logits.log_softmax(-1)
            with routed_merged(bank, [adapter] * 3, merged):
                result = bank.model(ids, use_cache=False).logits.log_softmax(-1)
            zeros = {name: MergedLayer(0 * layer.weight, None) for name, layer in merged.layers.items()}
            with routed_merged(bank, [adapter] * 3, MergedWeights(adapter, zeros)):
                without = bank.model(ids, use_cache=False).logits.log_softmax(-1)
        assert (without - expected).abs().max() > 1e-2  # the given weights are used
        assert (result - expected).abs().max() <= 1e-4, method
        assert (expected - base).abs().max() > 1e-2, method
    assert_unchanged(bank.model, before)


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.quick("llama", "gpt2", "opt", "phi")
def test_texts_of_merged_decoding_equal_those_of_unmerged(architecture: str) -> None:
    bank = bank_for(architecture)
    before = base_weights(bank.model)
    for adapter in range(len(METHODS)):
        requests = [Request(adapter, prompt, (f"{prompt} 0", f"{prompt} 1")) for prompt in PROMPTS]
        for sampling in (GREEDY, WARM):
            merging = AlwaysMerged(bank)
            merged = decode(bank, requests, sampling, merging=merging, rows=4)
            assert merging.rows <= 4
            assert merged == decode(bank, requests, sampling, rows=4)
    assert_unchanged(bank.model, before)


def test_batches_change_between_merged_and_mixed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for()
    requests = [Request(a, p, (f"{p} 0", f"{p} 1")) for p in PROMPTS for a in (0, 2, -1, 4)]
    batches: list[tuple[frozenset[int], bool]] = []
    routed = MergedDecoding.routed

    def observed(merging: MergedDecoding, adapters: list[int]) -> Any:
        context = routed(merging, adapters)
        in_use = merging.merged is not None and set(adapters) == {merging.merged.adapter}
        batches.append((frozenset(adapters), in_use))
        return context

    monkeypatch.setattr(AlwaysMerged, "routed", observed)
    for rows in (1, 2, 3, 32):
        for sampling in (GREEDY, WARM):
            merged = decode(bank, requests, sampling, merging=AlwaysMerged(bank), rows=rows)
            assert merged == decode(bank, requests, sampling, rows=rows)
    assert {in_use for adapters, in_use in batches if len(adapters) > 1} == {False}
    assert {in_use for adapters, in_use in batches if adapters == {-1}} == {False}
    assert any(in_use for adapters, in_use in batches if adapters == {0})


def test_nothing_else_sees_merged_weights_after_an_exception() -> None:
    bank = bank_for()
    before = base_weights(bank.model)
    ids = torch.tensor([[5, 6, 7]])

    def logits(adapter: int) -> Tensor:
        with torch.no_grad(), bank.routed([adapter]):
            return bank.model(ids, use_cache=False).logits

    expected = [logits(adapter) for adapter in range(-1, len(METHODS))]
    merging = AlwaysMerged(bank)

    def interrupt(request: int, sample: int, tokens: Any) -> None:
        if len(tokens) == 5:
            assert merging.merged is not None
            assert merging.merged.layers
            raise KeyboardInterrupt

    decoder = Decoder(
        bank.model, byte_tokenizer(), bank.routed, sampling=GREEDY, max_new_tokens=12, merging=merging
    )
    with pytest.raises(KeyboardInterrupt):
        decoder.run([Request(0, "return", ("",))], lambda generated: None, interrupt)
    assert merging.merged is None
    assert bank.router.routing is None
    assert_unchanged(bank.model, before)
    for adapter, before_logits in zip(range(-1, len(METHODS)), expected, strict=True):
        assert torch.equal(logits(adapter), before_logits)


def test_training_under_a_merged_routing_uses_the_adapter() -> None:
    bank = bank_for()
    ids = torch.tensor([[5, 6, 7]])
    with routed_merged(bank, [0], merged_weights(bank, 0)):
        bank.model(ids, use_cache=False).logits.sum().backward()
    assert bank.gradient_row(0).abs().max() > 0
    with bank.routed([0]):
        with_gradients = bank.model(ids, use_cache=False).logits
    with routed_merged(bank, [0], merged_weights(bank, 0)):
        assert torch.equal(bank.model(ids, use_cache=False).logits, with_gradients)


def test_rows_of_another_adapter_are_refused() -> None:
    bank = bank_for()
    merged = merged_weights(bank, 0)
    for adapters in ([0, 1], [1], [-1], [0, -1]):
        with pytest.raises(ValueError, match="merged weights of 0"), routed_merged(bank, adapters, merged):
            pass
    assert bank.router.routing is None


def test_paged_adapters_are_merged_from_the_device() -> None:
    expected = bank_for()
    bank = bank_for(paging=Paging(1))
    requests = [Request(adapter, prompt, ("",)) for prompt in PROMPTS for adapter in range(-1, len(METHODS))]
    assert decode(bank, requests, merging=AlwaysMerged(bank)) == decode(expected, requests)
    for adapter in range(len(METHODS)):
        assert torch.equal(bank.row(adapter), expected.row(adapter))


def test_layers_whose_merged_weight_would_differ_are_not_merged() -> None:
    bank = bank_for()
    everything = mergeable_modules(bank, 0)
    assert everything
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mergeable_modules(bank, 0) == []
    hooked, replaced, special = (bank.model.get_submodule(name).base_layer for name in everything[:3])  # type: ignore[union-attr]
    hooked.register_forward_hook(lambda module, args, output: output)  # type: ignore[operator]
    replaced.forward = replaced.forward  # type: ignore[union-attr]
    assert mergeable_modules(bank, 0) == everything[2:]

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    special.__class__ = Scaled  # type: ignore[assignment]
    assert mergeable_modules(bank, 0) == everything[3:]
    bank.model.to(torch.bfloat16)
    assert mergeable_modules(bank, 0) == []
    assert decode(bank, [Request(0, "return", ("",))], merging=AlwaysMerged(bank)).keys() == {(0, 0)}


def test_quantized_layers_are_not_merged() -> None:
    bank = bank_for()
    everything = mergeable_modules(bank, 0)
    layer: Any = bank.model.get_submodule(everything[0])
    layer.base_layer = Int8Linear(layer.base_layer)
    assert mergeable_modules(bank, 0) == everything[1:]


def test_a_sharded_base_is_not_merged(tmp_path: Path) -> None:
    bank = bank_for()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        apply_fsdp(bank)
        assert mergeable_modules(bank, 0) == []
    finally:
        torch.distributed.destroy_process_group()


def test_costs_are_measured_without_a_trace() -> None:
    bank = bank_for()
    before, state = base_weights(bank.model), torch.random.get_rng_state()
    costs = measure_layers(bank, 0, 4)
    modules = [module for cost in costs for module in cost.modules]
    assert sorted(modules) == sorted(mergeable_modules(bank, 0))
    assert all(cost.merge_seconds > 0 for cost in costs)
    shapes = {cost.bytes for cost in costs}
    assert len(shapes) > 1
    assert bank.router.routing is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_unchanged(bank.model, before)


def test_a_layer_is_merged_if_the_steps_save_more_than_merging_takes() -> None:
    cheap = LayerCosts(("a", "b"), merge_seconds=1.0, saved_seconds=0.5, bytes=10)
    dear = LayerCosts(("c",), merge_seconds=8.0, saved_seconds=0.5, bytes=10)
    slower = LayerCosts(("d",), merge_seconds=0.0, saved_seconds=-0.1, bytes=10)
    costs = [dear, slower, cheap]
    assert worthwhile(costs, 2.0, budget=100, merged=()) == []
    assert worthwhile(costs, 2.1, budget=100, merged=()) == ["a", "b"]
    assert worthwhile(costs, 17.0, budget=100, merged=("a",)) == ["b", "c"]
    assert worthwhile(costs, 17.0, budget=20, merged=()) == ["a", "b"]
    assert worthwhile(costs, 17.0, budget=9, merged=()) == []
    assert worthwhile(costs, 1e9, budget=100, merged=()) == ["a", "b", "c"]


@contextmanager
def measured(monkeypatch: pytest.MonkeyPatch, merge_seconds: float, saved_seconds: float) -> Iterator[None]:
    """Measurements of these costs for all layers together."""

    def costs(bank: AdapterBank, adapter: int, rows: int) -> list[LayerCosts]:
        modules = tuple(mergeable_modules(bank, adapter))
        count = len(modules)
        return [LayerCosts(modules, merge_seconds / count, saved_seconds / count, 1)]

    with monkeypatch.context() as patch:
        patch.setattr(module_under_test, "measure_layers", costs)
        yield


def first_merged_step(bank: AdapterBank, merging: MergedDecoding, tokens: int = 40) -> int | None:
    """The number of tokens of a single row when its adapter is merged."""
    first: list[int] = []

    def stream(request: int, sample: int, so_far: Any) -> None:
        if merging.merged is not None and not first:
            first.append(len(so_far))

    decoder = Decoder(
        bank.model, byte_tokenizer(), bank.routed, sampling=GREEDY, max_new_tokens=tokens, merging=merging
    )
    decoder._end_tokens = frozenset()
    decoder.run([Request(0, "return", ("",))], lambda generated: None, stream)
    return first[0] if first else None


def test_the_time_of_merging_follows_from_the_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for()
    with measured(monkeypatch, merge_seconds=10.0, saved_seconds=1.0):
        merging = MergedDecoding(bank)
        # Without a row that has ended, after as many steps as merging must save.
        assert first_merged_step(bank, merging) == 12
        # Now a row of 40 tokens is known.
        assert first_merged_step(bank, merging) == 2
    with measured(monkeypatch, merge_seconds=1.5, saved_seconds=1.0):
        assert first_merged_step(bank, MergedDecoding(bank)) == 3
    with measured(monkeypatch, merge_seconds=100.0, saved_seconds=1.0):
        assert first_merged_step(bank, MergedDecoding(bank)) is None
    with measured(monkeypatch, merge_seconds=0.001, saved_seconds=-1.0):
        assert first_merged_step(bank, MergedDecoding(bank)) is None


def test_no_layer_is_merged_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for()
    with measured(monkeypatch, merge_seconds=0.0, saved_seconds=1.0):
        merging = MergedDecoding(bank)
        monkeypatch.setattr(merging, "_free_bytes", lambda: 3)
        requests = [Request(0, prompt, ("",)) for prompt in PROMPTS]
        seen: list[int] = []
        merge = MergedDecoding._merge

        def observed(*arguments: Any) -> None:
            merge(*arguments)
            assert merging.merged is not None
            seen.append(len(merging.merged.layers))

        monkeypatch.setattr(MergedDecoding, "_merge", observed)
        assert decode(bank, requests, merging=merging) == decode(bank, requests)
        assert seen[0] == 3


def test_expected_tokens_are_those_of_rows_that_became_longer() -> None:
    merging = MergedDecoding(bank_for())
    assert merging.expected_tokens(0, 100) == 0
    assert merging.expected_tokens(30, 100) == 30
    assert merging.expected_tokens(80, 100) == 20
    for length in (10, 20, 30):
        merging.note_length(length)
    assert merging.expected_tokens(0, 100) == 20
    assert merging.expected_tokens(15, 100) == 10
    assert merging.expected_tokens(15, 20) == 5
    assert merging.expected_tokens(40, 100) == 40


def test_rows_of_another_adapter_that_wait_shorten_the_outlook(monkeypatch: pytest.MonkeyPatch) -> None:
    merging = MergedDecoding(bank_for())
    steps: list[float] = []
    monkeypatch.setattr(merging, "_merge", lambda adapter, rows, expected: steps.append(expected))

    def row(adapter: int, tokens: int) -> Row:
        return Row(0, 0, adapter, "", (), [1], frozenset(), [1] * tokens)

    live = [row(0, tokens) for tokens in (2, 4, 6, 8)]
    options = {"limit": 100, "max_rows": 4, "admit_at": 3}
    merging.prepare(live, [], **options)
    merging.prepare(live, [[row(1, 0)]], **options)  # a place is free when the first row ends
    merging.prepare(live[:3], [[row(1, 0)]], **options)  # it is read in now
    merging.prepare([*live[:3], row(1, 5)], [], **options)
    merging.prepare([row(-1, 5)], [], **options)
    assert steps == [8, 2]
    merging.note_length(50)
    merging.prepare(live, [[row(0, 0)] * 2], **options)
    assert steps[-1] == 48 + 2 * 50 / 4


def test_models_that_decode_one_row_at_a_time_merge_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_for()
    requests = [Request(adapter, prompt, ("a", "b")) for prompt in PROMPTS for adapter in (1, 3)]
    for mode in ("single_row", "uncached"):
        monkeypatch.setattr(
            "flora_train.evaluation.generation.decoder.batching_mode", lambda model, m=mode: m
        )
        expected = decode(bank, requests, WARM)
        assert decode(bank, requests, WARM, merging=AlwaysMerged(bank)) == expected


def test_the_adapters_of_these_tests_differ() -> None:
    requests = [Request(adapter, "return", ("",)) for adapter in range(-1, len(METHODS))]
    assert len(set(decode(bank_for(), requests).values())) == len(METHODS) + 1


@pytest.mark.full
@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs make model")
def test_smollm2_decides_by_itself_and_keeps_its_texts() -> None:
    config = ModelConfig(path=str(SMOLLM2), dtype="float32")
    model, tokenizer = load_base_model(config, torch.device("cpu")).eval(), load_tokenizer(config)
    specs = [spec("flora", rank=4), spec("lora", rank=4), spec("ia3")]
    bank = AdapterBank.attach(model, specs)
    for adapter in range(len(specs)):
        row = bank.row(adapter)
        row += 0.01 * torch.randn(row.shape, generator=torch.Generator().manual_seed(adapter))
    prompt = "# Returns the sum of two numbers.\ndef add(a, b):"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    merging = MergedDecoding(bank)
    for adapter in range(len(specs)):
        with torch.no_grad():
            with bank.routed([adapter]):
                expected = model(ids, use_cache=False).logits.log_softmax(-1)
            with routed_merged(bank, [adapter], merged_weights(bank, adapter)):
                result = model(ids, use_cache=False).logits.log_softmax(-1)
        assert (result - expected).abs().max() <= 1e-4
        texts: list[dict[int, str]] = []
        for chosen in (None, merging):
            generated: dict[int, str] = {}

            def store(sample: Generated, generated: dict[int, str] = generated) -> None:
                generated[sample.sample] = sample.text

            decoder = Decoder(model, tokenizer, bank.routed, sampling=WARM, max_new_tokens=8, merging=chosen)
            decoder.run([Request(adapter, prompt, ("a", "b"))], store)
            texts.append(generated)
        assert texts[0] == texts[1]
