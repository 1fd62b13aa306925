"""The table of published models: names in any case, and configurations that have the published parameters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

from flora_train.config.published_models import (
    PublishedModel,
    published_model,
    published_models,
    published_parameters,
)

DIFFERENT = list({model.parameters: model for model in published_models()}.values())


@pytest.mark.parametrize("model", DIFFERENT, ids=lambda model: model.name)
def test_the_configuration_has_the_published_parameters(model: PublishedModel) -> None:
    values = dict(model.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto_class = AutoModelForCausalLM
    if config.model_type == "whisper":
        auto_class = AutoModelForSpeechSeq2Seq
    with torch.device("meta"):
        empty = auto_class.from_config(config)
    assert sum(parameter.numel() for parameter in empty.parameters()) == model.parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("bigcode/starcoder", 15.5),
        ("BigCode/StarCoder", 15.5),
        ("bigcode/starcoder2-3b", 3.03),
        ("Qwen/Qwen2.5-Coder-7B-instruct", 7.6),
        ("meta-llama/CodeLlama-34b-hf", 33.7),
        ("openai/whisper-large", 1.54),
        ("openai/whisper-large-v3-turbo", 0.809),
        ("distil-whisper/distil-large-v3", 0.756),
    ],
)
def test_models_are_found_in_any_case(name: str, billions: float) -> None:
    parameters = published_parameters(name)
    assert parameters is not None
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_model_of_another_name_is_not_in_the_table() -> None:
    for name in ("starcoder", "bigcode/starcoder-40b", "assets/models/smollm2-135m", ""):
        assert published_model(name) is None


def test_the_table_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from flora_train.config.published_models import published_parameters\n"
        "assert published_parameters('bigcode/starcoder') == 15_517_456_384\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
