"""Hours on a GPU follow from the committed figures, and the headline recipes fit on a GPU of 80 GB."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flora_train.adapters.pool import build_pools
from flora_train.adapters.spec import expand
from flora_train.commands.plan_gpus import PROGRAMS_A_SECOND, GpuReport, report_on_gpus
from flora_train.config.load import load_config
from flora_train.config.published_models import published_parameters
from flora_train.config.schema import RunConfig
from flora_train.data.assumed_rows import TRANSCRIPT_TOKENS, assumed_tasks
from flora_train.models.loading import empty_model
from flora_train.models.model_sizes import model_sizes
from flora_train.training.gpu_hours import (
    FLOPS,
    MEASURED_PARAMETERS,
    MEASURED_SPEED,
    SOURCE,
    generation_hours,
    hours,
)
from flora_train.training.gpu_memory import Settings
from flora_train.training.step_cost import adapters_of_steps
from flora_train.training.step_plan import make_mixture

ROOT = Path(__file__).parents[3]
WINDOW = 1500


def report_of(name: str, *words: str, window: int = 0) -> tuple[RunConfig, GpuReport]:
    config = load_config([f"recipe={name}", *words])
    with model_sizes(config.model) as sizes:
        assert sizes.origin == "published"
        config = config.model_copy(update={"model": sizes.config})
        model = empty_model(config.model)
        pools, _ = build_pools(model, expand(config))
        return config, report_on_gpus(config, model, pools, assumed_tasks(config, window))


@pytest.fixture(scope="module")
def code() -> tuple[RunConfig, GpuReport]:
    return report_of("multipl_e")


@pytest.fixture(scope="module")
def speech() -> tuple[RunConfig, GpuReport]:
    return report_of("common_voice", window=WINDOW)


def test_the_speeds_are_those_of_the_committed_figures() -> None:
    text = (ROOT / SOURCE).read_text()
    for method, name in {"lora": "lora", "flora": "flora, split"}.items():
        figure = re.search(rf"\| 8 \| ours, {name} \| (\d+) \|", text)
        assert figure is not None
        assert MEASURED_SPEED[method] == int(figure[1])
    assert "H100" in text
    assert published_parameters("bigcode/starcoder2-3b") == MEASURED_PARAMETERS
    text = (ROOT / "benchmarks" / "results" / "execution.md").read_text()
    for name, kind in {"Lua": "interpreted", "C[+][+]": "compiled"}.items():
        figure = re.search(rf"\| {name} \| \d+ \| ([\d.]+) \|", text)
        assert figure is not None
        assert PROGRAMS_A_SECOND[kind] == pytest.approx(float(figure[1]) / 2)  # two cores


def test_the_work_of_multipl_e_is_that_of_its_tokens(code: tuple[RunConfig, GpuReport]) -> None:
    """27 adapters x 8 examples of 1024 tokens x 1500 steps; 4 models x 9 languages x 161 x 100 texts."""
    _, report = code
    tokens = 27 * 8 * 1024 * 1500
    assert sum(report.work.training.values()) == pytest.approx(4 * 15.5e9 * tokens, rel=0.05)
    assert report.work.training["flora"] == pytest.approx(report.work.training["ia3"])
    assert report.work.completions == 4 * 9 * 161 * 100 == sum(report.programs.values())
    assert report.work.generated_token == pytest.approx(2 * 15.5e9, rel=0.05)
    one = hours(report.work.training, 80, 1)
    slowest = sum(report.work.training.values()) / FLOPS["flora"] / 3600
    fastest = sum(report.work.training.values()) / FLOPS["lora"] / 3600
    assert fastest < one < slowest
    assert hours(report.work.training, 80, 8) == pytest.approx(one / 8)
    assert hours(report.work.training, 24, 1) > 5 * one
    assert generation_hours(report.work, 200, 80, 1) < generation_hours(report.work, 1024, 80, 1)


def test_the_work_of_common_voice_is_that_of_its_clips(speech: tuple[RunConfig, GpuReport]) -> None:
    """30 adapters x 6 clips x 5000 steps; the encoder has two fifths of the parameters."""
    _, report = speech
    positions = 30 * 6 * 5000 * WINDOW
    encoder = 4 * 0.64e9 * positions
    assert encoder < sum(report.work.training.values()) < 2 * encoder
    assert report.work.completions == 0
    assert report.work.contenders == 30 + 6


@pytest.mark.parametrize(("recipe", "adapters", "length"), [("code", 27, 1024), ("speech", 30, 1540)])
def test_a_step_holds_what_the_recipe_says(
    recipe: str, adapters: int, length: int, request: pytest.FixtureRequest
) -> None:
    config, _ = request.getfixturevalue(recipe)
    window = length - TRANSCRIPT_TOKENS if recipe == "speech" else 0
    tasks = assumed_tasks(config, window)
    assert {len(names) for names in adapters_of_steps(config, tasks)} == {adapters}
    mixture = make_mixture(tasks, expand(config), config)
    examples = sum(len(draw.examples) * len(draw.adapters) for draw in mixture.step(0))
    assert examples == adapters * config.mixture.examples_per_draw
    assert examples * length <= config.training.tokens_per_step


@pytest.mark.parametrize("recipe", ["code", "speech"])
def test_the_recipe_fits_on_80_gb_and_with_the_keys_of_the_plan_on_24(
    recipe: str, request: pytest.FixtureRequest
) -> None:
    config, report = request.getfixturevalue(recipe)
    single, small, *several = report.plans
    assert single.fits
    assert all(plan.fits for plan in several)
    assert single.settings == Settings.of(config)
    assert single.memory.total < 70e9  # an estimate needs room
    assert not small.fits
    assert small.fitting is not None
    assert small.fitting.total <= 24e9
    assert small.setup.quantization == ("8bit" if recipe == "code" else "none")
    assert [plan.setup.is_sharded for plan in several] == [recipe == "code"] * 2


def test_the_former_micro_batch_of_multipl_e_was_too_large() -> None:
    _, report = report_of("multipl_e", "training.tokens_per_microbatch=16384")
    single = report.plans[0]
    assert not single.fits
    assert single.settings is not None
    assert single.settings.tokens_per_microbatch == 8192
    assert not single.settings.checkpointing
    _, report = report_of(
        "multipl_e",
        "training.tokens_per_microbatch=16384",
        "model.gradient_checkpointing=non_reentrant",
    )
    assert report.plans[0].fits


def test_a_model_that_fits_nowhere_is_said_so() -> None:
    _, report = report_of(
        "multipl_e",
        "training.max_length=8192",
        "training.tokens_per_microbatch=8192",
        "training.tokens_per_step=2e6",
    )
    assert report.plans[1].settings is None


def test_on_another_gpu_the_base_is_in_bfloat16_whatever_this_machine_has(
    code: tuple[RunConfig, GpuReport],
) -> None:
    _, report = code
    assert report.plans[0].memory.base == 2 * 15_517_456_384
    assert report.plans[1].memory.base == pytest.approx(15_517_456_384, rel=0.03)
