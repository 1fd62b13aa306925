"""flora-train export, as a user would call it: what it writes is loaded by plain PEFT and transformers."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from flora_train.cli import main
from tests.e2e.conftest import Launch
from tests.forked import python

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def run(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", "training.steps=6", "evaluation.interval=null")
    assert done.returncode == 0, done.stderr
    return folder


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "flora_train", *words)


def export(*words: str) -> subprocess.CompletedProcess[str]:
    return command("export", *words)


def logits_of(checkpoint: Path, adapter: Path | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(IDS).logits


def test_merged_models_equal_the_adapted_ones(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    names = ("digits-flora", "letters-ia3")
    done = export(str(run), *names, "--as", "merged", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in names:
        merged = logits_of(tmp_path / name)
        torch.testing.assert_close(
            merged, logits_of(checkpoint, run / "adapters" / name), rtol=1e-4, atol=1e-5
        )
        assert (merged - logits_of(checkpoint)).abs().max() > 0.01
    again = export(str(run), names[0], "--as", "merged", "--out", str(tmp_path))
    assert again.returncode == 2
    assert "exists already: choose another with --out, or delete it" in again.stderr


def test_the_closest_lora_comes_with_its_error_and_what_it_costs(run: Path, checkpoint: Path) -> None:
    names = ("digits-flora", "digits-lora", "letters-flora")
    done = export(str(run), *names, "--as", "lora-svd", "--rank=2")
    assert done.returncode == 0, done.stderr
    rows = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if (cells := line.split()) and cells[0] in names
    }
    assert rows.keys() == set(names)
    errors = {name: float(cells[1]) for name, cells in rows.items()}
    assert errors["digits-lora"] == 0.0  # it is of rank 2 itself
    assert 0.0 < errors["digits-flora"] < 1.0
    for name, (rank, _, base, adapter, lora) in rows.items():
        assert rank == "2"
        assert float(adapter) < float(base)
        assert float(lora) < float(base)
        card = (run / "lora-svd" / name / "README.md").read_text()
        assert f"|dW - B A| / |dW| = {errors[name]:.3f}" in card
        assert f"| this LoRA | {lora} |" in card
    torch.testing.assert_close(
        logits_of(checkpoint, run / "lora-svd" / "digits-lora"),
        logits_of(checkpoint, run / "adapters" / "digits-lora"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_rank_follows_from_the_error_that_is_allowed(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = export(str(run), "digits-flora", "--as", "lora-svd", "--max-error", "0.01", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (cells,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["digits-flora"])
    assert float(cells[2]) <= 0.01
    assert 2 < int(cells[1]) <= 32
    svd_lora, adapter = (
        logits_of(checkpoint, tmp_path / "digits-flora"),
        logits_of(checkpoint, run / "adapters" / "digits-flora"),
    )
    assert (svd_lora - adapter).abs().max() < 0.05 * (adapter - logits_of(checkpoint)).abs().max()


@pytest.mark.parametrize("name", ["digits-flora", "letters-lora", "letters-ia3"])
def test_the_card_has_results_and_a_snippet_that_loads_the_adapter(run: Path, name: str) -> None:
    card = (run / "adapters" / name / "README.md").read_text()
    assert f"| **{name.partition('-')[2]}** | " in card
    assert "## Limits\n\n- " in card
    snippet = re.search(r"```python\n(.*?)```", card, re.S)
    assert snippet is not None
    checks = (
        "assert model.peft_config['default'].peft_type.value in ('LORA', 'IA3', 'HIRA') and "
        "tokenizer('a')['input_ids']"
    )
    loaded = python("-c", snippet[1] + checks, folder=run / "adapters")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip()  # what model.generate wrote


def test_flora_under_a_type_of_its_own_keeps_its_rank(run: Path, checkpoint: Path) -> None:
    done = export(str(run), "--as", "flora")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (run / "flora").iterdir())
    assert names == ["digits-flora", "letters-flora"]
    config = json.loads((run / "flora" / names[0] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("FLORA", 2)
    snippet = re.search(r"```python\n(.*?)```", (run / "flora" / names[0] / "README.md").read_text(), re.S)
    assert snippet is not None
    show = (
        f"import torch\nids = torch.tensor({IDS.tolist()})\nwith torch.no_grad():\n"
        "    torch.save(model(ids).logits, 'logits')\n"
    )
    loaded = python("-c", snippet[1] + show, folder=run / "flora")
    assert loaded.returncode == 0, loaded.stderr
    torch.testing.assert_close(
        torch.load(run / "flora" / "logits"),
        logits_of(checkpoint, run / "adapters" / names[0]),
        rtol=1e-4,
        atol=1e-5,
    )
    refused = export(str(run), "digits-lora", "--as", "flora")
    assert refused.returncode == 2
    assert (
        "adapter = 'digits-lora': is lora: --as flora writes fLoRA only; --as peft writes all methods"
        in refused.stderr
    )


def test_converted_lora_is_a_flora_that_a_run_starts_from(
    run: Path, recipe: Path, checkpoint: Path, launch: Launch, tmp_path: Path
) -> None:
    source, out = run / "adapters" / "digits-lora", tmp_path / "digits"
    done = command("convert", str(source), "--out", str(out), "--rank", "16")
    assert done.returncode == 0, done.stderr
    found = re.search(r"= (0\.\d+) over 14 layers", done.stdout)
    assert found is not None
    assert f"= {found[1]} over 14 layers" in (out / "README.md").read_text()
    plain, lora, flora = (logits_of(checkpoint, folder) for folder in (None, source, out))
    assert (flora - lora).norm() < 0.8 * (lora - plain).norm()
    words = ["adapters.flora.rank=16", "adapters.flora.tasks=[digits]"]
    begins = {"fitted before": out, "fitted at the start": source}
    losses = {}
    for name, start in begins.items():
        folder = tmp_path / name.replace(" ", "-")
        done = launch(
            f"recipe={recipe}",
            f"output_dir={folder}",
            *words,
            f"adapters.flora.init_from={start}",
            "training.steps=3",
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first = next(line for line in lines if line["kind"] == "evaluation")
        assert first["step"] == 0
        losses[name] = first["adapters"]["digits-flora"]["loss"]
        report = json.loads((folder / "eval" / "report.json").read_text())
        rows = {row["name"]: row["loss"] for result in report["results"] for row in result["contenders"]}
        assert rows["digits-flora"] <= losses[name] + 1e-6  # at worst it stays what it began as
    assert losses["fitted before"] == pytest.approx(losses["fitted at the start"], rel=1e-5)


def test_only_a_lora_is_converted_and_nothing_is_overwritten(
    run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(init_lora_weights="pissa_niter_1", target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).save_pretrained(
        tmp_path / "pissa"
    )
    for words, line in (
        ([str(tmp_path / "pissa"), "--out", str(tmp_path / "x")], "init_lora_weights='pissa_niter_1'"),
        (
            [str(run / "adapters" / "digits-ia3"), "--out", str(tmp_path / "x")],
            "is of kind IA3: LORA is converted; HIRA and IA3 need no conversion",
        ),
        ([str(run / "adapters" / "digits-lora"), "--out", str(tmp_path)], "exists already: choose another"),
        (["/nowhere", "--out", str(tmp_path / "x")], "adapter = '/nowhere': is not a PEFT adapter"),
    ):
        assert main(["convert", *words]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "{run}/adapters/digits-lora", "--out", "/proc/x"],
        ["export", "{run}", "--as", "lora-svd", "--out", "/proc/x"],
    ],
    ids=" ".join,
)
def test_unwritable_folder_is_reported_before_anything_is_computed(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=run) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: /proc/x: may not be written (No such file or directory)")
