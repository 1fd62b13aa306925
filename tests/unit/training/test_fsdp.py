"""Sharding the base: accepted models and memory per process (values: tests/e2e/test_run.py)."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig

from flora_train.config.errors import UserError
from flora_train.config.load import load_config
from flora_train.models.loading import check_model_type
from flora_train.training.fsdp import check_launcher, is_sharded, largest_part, layers_of
from tests.architectures import tiny_model


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_an_engine_of_the_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, engine: str
) -> None:
    check_launcher()
    monkeypatch.setenv(variable, "false")
    check_launcher()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        UserError,
        match=(
            rf"{variable} = 'true': {engine} of accelerate's configuration has no effect.* model\.fsdp=true "
            r"shards the base"
        ),
    ):
        check_launcher()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_bigcode", "starcoder2", "qwen3"])
def test_every_layer_is_gathered_by_itself(name: str) -> None:
    model = tiny_model(name)
    assert not is_sharded(model)
    assert len(layers_of(model)) == 2


def test_process_holds_its_shards_two_whole_layers_and_the_rest() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    layer, total = (sum(p.numel() for p in module.parameters()) for module in (layers_of(model)[0], model))
    outside = total - 8 * layer
    assert largest_part(model, 1) == 1.0
    assert largest_part(model, 4) == pytest.approx((8 / 4 * layer + 2 * layer + outside) / total)


def test_quantised_and_speech_models_are_not_sharded() -> None:
    with pytest.raises(
        UserError,
        match=r"model\.fsdp = True: cannot shard a base model in 8bit: set model\.quantization=none",
    ):
        load_config(["recipe=quickstart", "model.quantization=8bit", "model.fsdp=true"])
    config = load_config(["recipe=speech_local", "model.fsdp=true"])
    with pytest.raises(
        UserError, match=r"model\.fsdp = True: is for text models: a speech model must be whole"
    ):
        check_model_type(WhisperConfig(), config)
