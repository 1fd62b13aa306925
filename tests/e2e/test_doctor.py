"""flora-train doctor says what the layers of a run would take, and refuses what the run would refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flora_train.cli import main
from flora_train.evaluation.code.programs.languages import load_languages

HEADINGS = ("versions", "device", "base", "backend", "triton", "precision", "thresholds")


def test_every_family_and_layer_is_explained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"recipe={recipe}", "training.tokens_per_microbatch=6000"]) == 0
    said = capsys.readouterr().out
    assert all(any(line.startswith(heading) for line in said.splitlines()) for heading in HEADINGS)
    for family in ("2 x flora, rank 2", "2 x lora, rank 2", "2 x ia3"):
        assert family in said
    assert "2 down_proj 48 x 32" in said
    assert "for 1000 tokens, 3 terms cost" in said  # 6000 tokens, six adapters
    assert "W0 * M formed for all adapters at once" in said


def test_few_tokens_and_precision_change_what_it_says(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "model.dtype=bfloat16",
        "kernels.precision=fused",
        "adapters.flora.variant=pure",
        "adapters.flora.rank=1",
    ]
    assert main(["doctor", f"recipe={recipe}", *options]) == 0
    said = capsys.readouterr().out
    assert "no part of M is computed separately (kernels.precision=fused)" in said
    assert "rank expansion" in said
    assert "one term" in said
    assert main(["doctor", f"recipe={recipe}", *options, "kernels.precision=split"]) == 0
    said = capsys.readouterr().out
    assert "M - 1 is computed separately from 1" in said
    assert "one term" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
@pytest.mark.parametrize("word", ["model.quantization=4bit"])
def test_doctor_refuses_an_impossible_recipe_after_the_diagnosis(
    word: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"recipe={recipe}", word]) == 2
    said = capsys.readouterr()
    assert "2 x flora" in said.out
    key, _, value = word.partition("=")
    assert said.err.startswith(f"error: {key} = '{value}': needs a")


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(("lua", "py", "sh", "ada"), id="some"),
        pytest.param(tuple(load_languages()), id="every language", marks=pytest.mark.full),
    ],
)
def test_without_a_recipe_it_says_what_the_machine_is_ready_for(
    keys: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    languages = {key: load_languages()[key] for key in keys}
    monkeypatch.setattr("flora_train.commands.doctor.load_languages", lambda: languages)
    monkeypatch.setattr(
        "flora_train.commands.doctor.find_spec", lambda name: None if name == "wandb" else object()
    )
    assert main(["doctor"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["wandb"] == "wandb: not installed: pip install 'flora-train[wandb]'"
    assert lines["hub"].endswith(("ready", "login"))
    assert "GB free here" in lines["disk"]
    if lines["sandbox"] == "bubblewrap confines programs here":
        ready = lines["languages"].partition(": ")[2].split(", ")
        assert "py" in ready
        for key, language in languages.items():
            assert key in ready or language.how_to_install in lines[key]
    else:
        assert "apt-get install" in lines["sandbox"]
