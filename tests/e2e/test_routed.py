"""A run with a routed adapter beside a plain one, through the command line: trained, resumed, evaluated,
exported, loaded by the documented lines, refused where it cannot be."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flora_train.export.routed_snippet import LOADER
from flora_train.run_context import load_run
from tests.documents import ROOT, blocks
from tests.e2e.conftest import Launch, launch_environment
from tests.e2e.test_chat import GREEDY, answers, chat
from tests.e2e.test_resume import Kill, kill_after
from tests.forked import python

DOCUMENT = ROOT / "docs" / "routed_export.md"
NAME = "letters-mix"
__all__ = ["kill_after"]


@pytest.fixture(scope="module")
def routed_recipe(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixlora on both tasks, a lora on one."""
    content = yaml.safe_load(recipe.read_text())
    content["adapters"] = {
        "mix": {"method": "mixlora", "experts": 4, "rank": 2, "lr": 0.05, "jitter": 0.05, "dropout": 0.1},
        "lora": {"method": "lora", "rank": 2, "lr": 0.05, "tasks": ["letters"]},
    }
    content["mixture"]["examples_per_draw"] = 2
    path = tmp_path_factory.mktemp("routed") / "routed.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(routed_recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed") / "run"
    done = launch(f"recipe={routed_recipe}", f"output_dir={folder}", "training.save_every=6")
    assert done.returncode == 0, done.stderr
    line = r"letters-mix: experts: busiest \d+ %, least \d+ %, dead \d+ of 8, entropy \d\.\d of 1\.4 nats"
    assert re.search(line, done.stdout), done.stdout
    return folder


def command(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return python("-m", "flora_train", *words, folder=folder)


def report_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "eval" / "report.json").read_text())
    return content


def test_the_report_has_the_load_of_every_layer(run: Path) -> None:
    loads = report_of(run)["experts"]
    assert [load["adapter"] for load in loads] == [NAME, "digits-mix"]
    for load in loads:
        assert [layer["module"] for layer in load["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        for layer in load["layers"]:
            assert len(layer["shares"]) == 4
            assert sum(layer["shares"]) == pytest.approx(1.0)
    page = (run / "eval" / "report.html").read_text()
    assert 'id="experts"' in page
    assert page.count('class="heat load scroll"') == 2
    assert page.count(f"<b>{NAME}</b>") == 1


def test_a_resumed_run_ends_with_the_same_adapters_and_loads(
    run: Path, routed_recipe: Path, launch: Launch, kill_after: Kill, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    words = (f"recipe={routed_recipe}", f"output_dir={again}", "training.save_every=1")
    kill_after(3, again, *words)
    assert not (again / "eval" / "report.json").exists()
    done = launch(*words, "resume=true")
    assert done.returncode == 0, done.stderr
    assert report_of(again)["experts"] == report_of(run)["experts"]
    files = sorted(path for path in (run / "adapters").rglob("*.safetensors"))
    assert len(files) == 2 * 6 + 1
    for file in files:
        assert file.read_bytes() == (again / file.relative_to(run)).read_bytes()


def test_evaluating_again_finds_the_same_load(run: Path) -> None:
    before = report_of(run)["experts"]
    done = command("evaluate", str(run))
    assert done.returncode == 0, done.stderr
    assert report_of(run)["experts"] == before


def test_the_documented_lines_compute_the_logits(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The block of docs/routed_export.md, run as it stands in a process without this package's modules."""
    (block,) = blocks(DOCUMENT, "python")
    text = block.text.replace("outputs/mine/adapters/lua-mix", str(run / "adapters" / NAME))
    text = text.replace("Once upon a time", "abcd")
    assert LOADER in text
    assert "flora" not in text.replace(str(run), "")
    script = f"{text}\ntorch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    done = python("-c", script, environment=launch_environment(tmp_path / "cache"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    context, _ = load_run(str(run))
    ids = context.tokenizer("abcd", return_tensors="pt")["input_ids"]
    with torch.no_grad(), context.bank.routed([NAME]):
        ours = context.model(input_ids=ids).logits
    assert (torch.load(tmp_path / "logits.pt") - ours).abs().max() <= 1e-5


def test_the_card_loads_the_adapter_with_the_same_lines(run: Path) -> None:
    card = (run / "adapters" / NAME / "README.md").read_text()
    assert "A MixLoRA adapter for" in card
    assert LOADER in card
    assert "4 experts (lora), top 2" in card


def test_export_writes_what_it_can_and_refuses_the_rest(run: Path, tmp_path: Path) -> None:
    done = command("export", str(run), NAME, "--out", str(tmp_path / "peft"))
    assert done.returncode == 0, done.stderr
    assert len(load_file(tmp_path / "peft" / NAME / "router.safetensors")) == 2
    done = command("export", str(run), "--as", "mixlora")
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (run / "mixlora" / NAME).iterdir()}
    assert {"adapter_config.json", "adapter_model.bin"} <= files
    for form in ("merged", "lora-svd"):
        refused = command("export", str(run), NAME, "--as", form)
        assert refused.returncode == 2
        assert "is mixlora: a router chooses the experts of each token" in refused.stderr
    refused = command("export", str(run), "letters-lora", "--as", "mixlora")
    assert refused.returncode == 2
    assert "is lora: --as mixlora writes adapters of method mixlora" in refused.stderr


def test_commands_that_cannot_use_it_say_so(run: Path, tmp_path: Path) -> None:
    adapter = run / "adapters" / NAME
    refusals = {
        ("serve", str(run), NAME): "is a routed adapter (mixlora), and vLLM has no router",
        ("convert", str(adapter), "--out", str(tmp_path / "x")): "it is a routed adapter (routing.json)",
    }
    for words, reason in refusals.items():
        done = command(*words)
        assert done.returncode == 2
        assert reason in done.stderr


def test_chat_answers_with_a_routed_adapter_beside_the_base(run: Path, tmp_path: Path) -> None:
    done = chat(run, NAME, "--plain", *GREEDY, said="abcd", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in answers(done.stdout)] == ["base", NAME]


def test_push_shows_the_files_of_all_parts(run: Path) -> None:
    done = command("push", str(run), NAME, "--repo", "me/mine", "--dry-run", "--base", "me/base")
    assert done.returncode == 0, done.stderr
    for file in ("routing.json", "router.safetensors", "expert_3/adapter_model.safetensors", "README.md"):
        assert f"{NAME}/{file}" in done.stdout


def test_a_run_starts_from_the_folder(run: Path, routed_recipe: Path, launch: Launch, tmp_path: Path) -> None:
    """From our layout, with all settings read from it; another number of experts is refused."""
    content = yaml.safe_load(routed_recipe.read_text())
    start = str(run / "adapters" / "{task}-mix")
    content["adapters"] = {"mix": {"method": "mixlora", "lr": 0.05, "init_from": start}}
    path = tmp_path / "start.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    words = (f"recipe={path}", f"output_dir={tmp_path / 'run'}", "training.steps=1")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["adapters"]["mix"]
    assert (resolved["experts"], resolved["rank"], resolved["expert"]) == (4, 2, "lora")
    refused = launch(*words, "adapters.mix.experts=3", "overwrite=true")
    assert refused.returncode == 2
    assert "adapters.mix.experts = 3: is not that of" in refused.stderr
