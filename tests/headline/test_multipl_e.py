"""recipe=multipl_e as it stands, against a hub on loopback, with a tiny StarCoder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flora_train.config.errors import UserError
from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import open_sandbox
from tests.forked import ROOT
from tests.headline.conftest import add_repositories
from tests.headline.runs import CODE_SIZES, Finished, command, done, figures, hub_environment, launched
from tests.hub_server import serve

LANGUAGES = {"d": "d", "julia": "jl", "lua": "lua", "perl": "pl", "r": "r", "racket": "rkt"}
LANGUAGES |= {"ruby": "rb", "rust": "rs", "swift": "swift"}
"""Task -> key of its language."""
RANK_4 = ("lua", "racket")
SMALLER = (
    "training.steps",
    "training.max_length",
    "training.tokens_per_step",
    "training.tokens_per_microbatch",
    "mixture.examples_per_draw",
    "evaluation.max_examples",
    "evaluation.max_problems",
    "evaluation.num_samples",
    "evaluation.max_new_tokens",
    "task_defaults.max_validation_examples",
)
"""Keys that may differ from the recipe."""
FEW = (
    "training.steps=2",
    "evaluation.max_examples=4",
    "evaluation.max_problems=2",
    "evaluation.num_samples=2",
    "task_defaults.max_validation_examples=12",
)
"""What is smaller with the recipe's own data limits and lengths."""
REPOSITORY = "me/nine-languages"
PEFT_LOGITS = """
import sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(30, 62)[None]
arrays = {}
for name in sys.argv[3:]:
    base = AutoModelForCausalLM.from_pretrained("bigcode/starcoder", dtype=torch.float32)
    with torch.no_grad():
        arrays["base"] = base.eval()(ids).logits.numpy()
        adapted = PeftModel.from_pretrained(base, sys.argv[1], subfolder=name).eval()
        arrays[name] = adapted(ids).logits.numpy()
assert "flora_train" not in sys.modules
np.savez(sys.argv[2], **arrays)
"""
"""Logits by plain transformers and peft: REPOSITORY FILE ADAPTER..."""
BANK_LOGITS = """
import sys
import numpy as np, torch
from flora_train.run_context import load_run
context, _ = load_run(sys.argv[1], dtype="float32")
ids = torch.arange(30, 62)[None]
arrays = {}
for name in sys.argv[3:]:
    with torch.no_grad(), context.bank.routed([name]):
        arrays[name] = context.model(ids).logits.numpy()
np.savez(sys.argv[2], **arrays)
"""
"""Logits of the run's bank: RUN FILE ADAPTER..."""


@contextmanager
def finished_run(material: Path, folder: Path, *words: str, processes: int = 1) -> Iterator[Finished]:
    """recipe=multipl_e, run to its end, and the hub that it used."""
    with serve() as hub:
        add_repositories(hub, material)
        environment = hub_environment(hub.url, folder / "home")
        run = folder / "run"
        ended = done(launched("multipl_e", run, *words, processes=processes), environment, timeout=1800)
        assert ended.returncode == 0, ended.stderr
        yield Finished(run, hub, environment, ended.stdout, ended.stderr)


def runnable() -> dict[str, bool]:
    """Language -> whether its programs run here."""
    table = load_languages(None)
    rows = [table[key] for key in LANGUAGES.values()]
    try:
        broken = preflight(rows, open_sandbox("bubblewrap"))
    except UserError:  # no sandbox: nothing is executed
        broken = dict.fromkeys(LANGUAGES.values(), "no sandbox")
    return {key: key not in broken for key in LANGUAGES.values()}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts: dict[str, Any] = {}
    for key, inner in value.items():
        parts |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return parts


@pytest.mark.full
def test_recipe_runs_as_it_stands_from_training_to_adapters_on_the_hub(
    code_material: Path, tmp_path: Path
) -> None:
    with finished_run(code_material, tmp_path, *CODE_SIZES) as finished:
        check_configuration(finished)
        check_adapters(finished)
        check_requests(finished)
        check_programs(finished)
        check_pushed_adapters(finished, tmp_path)


@pytest.mark.headline
def test_recipe_runs_with_its_own_data_limits_and_lengths(large_code_material: Path, tmp_path: Path) -> None:
    with finished_run(large_code_material, tmp_path, *FEW) as finished:
        check_configuration(finished)
        check_adapters(finished)
        check_requests(finished)
        check_programs(finished)
        report = finished.report
        rows = {task["name"]: task["train"]["rows"] + task["validation"]["rows"] for task in report["tasks"]}
        assert rows["d"] == 20_000, "the limit on rows, of more"
        assert rows["julia"] < 20_000, "all rows, of fewer"
        steps = int(FEW[0].partition("=")[2])
        for adapter in report["adapters"]:
            assert adapter["tokens"] > 0.6 * steps * 8 * 1024, (
                "eight examples of up to 1,024 tokens in a step"
            )
        file = finished.run / "eval" / "multipl-e" / "completions-0.jsonl"
        lengths = [json.loads(line)["tokens"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert max(lengths) == 1024


def check_configuration(finished: Finished) -> None:
    """Nothing but the sizes differs from the recipe."""
    assert {word.partition("=")[0] for word in CODE_SIZES} <= set(SMALLER)
    recipe = flat(yaml.safe_load((ROOT / "recipes" / "multipl_e.yaml").read_text(encoding="utf-8")))
    ran = flat(yaml.safe_load((finished.run / "config.yaml").read_text(encoding="utf-8")))
    for key, value in recipe.items():
        if key not in (*SMALLER, "data_config"):
            assert ran[key] == value or ran[key] == [value], key


def check_adapters(finished: Finished) -> None:
    """Nine languages train 27 adapters of both ranks at once, on packed rows."""
    report = finished.report
    adapters = {adapter["name"]: adapter for adapter in report["adapters"]}
    expected = set()
    for task in LANGUAGES:
        suffix = "_rank4" if task in RANK_4 else ""
        expected |= {f"{task}-flora{suffix}", f"{task}-lora{suffix}", f"{task}-ia3"}
    assert set(adapters) == expected
    for name, adapter in adapters.items():
        assert adapter["tokens"] > 0, name
        if adapter["method"] != "ia3":
            assert adapter["rank"] == (4 if adapter["task"] in RANK_4 else 1)
        config = json.loads((finished.run / "adapters" / name / "adapter_config.json").read_text())
        assert config["target_modules"] == ["c_attn"]
    for task in report["tasks"]:
        counts = task["train"]
        assert counts["documents"] >= counts["examples"]
        assert counts["over_long_split"] > 0
        assert counts["empty"] >= 1
    assert any(task["train"]["documents"] > task["train"]["examples"] for task in report["tasks"]), "packed"
    for result in report["results"]:
        values = [row["bits_per_byte"]["value"] for row in (result["base"], *result["contenders"])]
        assert np.isfinite(values).all()
        assert len(set(values)) == 4, "every adapter has learnt something of its own"


def check_requests(finished: Finished) -> None:
    """Only the files that the recipe needs are read."""
    asked = [path for _, path in finished.hub.asked]
    for task in LANGUAGES:
        assert any(f"/data/{task}/" in path for path in asked), task
    for task in ("python", "java", "ada"):
        assert not any(f"/data/{task}/" in path and "resolve" in path for path in asked), task
    assert not any("mbpp-" in path and "resolve" in path for path in asked)
    assert "Traceback" not in finished.stderr
    assert "examples/s" not in finished.stderr, "no bars of other libraries"


def check_programs(finished: Finished) -> None:
    """Programs are executed in every language whose toolchain is installed, and the others are named."""
    runs_here = runnable()
    (suite,) = finished.report["code"]
    evaluated = {part["language"] for part in suite["languages"]}
    assert evaluated == {key for key, runs in runs_here.items() if runs}
    assert {part["language"] for part in suite["not_evaluated"]} == {
        key for key, runs in runs_here.items() if not runs
    }
    verdicts = figures(finished.run)["verdicts"]
    per_contender = Counter(key.rpartition("/")[0].rpartition("/")[0] for key in verdicts)
    assert set(per_contender.values()) <= {4}, "two samples of two problems"
    assert len(per_contender) == 4 * len(evaluated)
    for part in suite["not_evaluated"]:
        assert part["reason"]
    if evaluated:
        assert set(suite["macro"]["languages"]) == evaluated, "both ranks are one method"
        families = [row["family"] for row in suite["macro"]["contenders"]]
        assert families == ["base", "flora", "lora", "ia3"]


def check_pushed_adapters(finished: Finished, tmp_path: Path) -> None:
    """Loaded from the hub by plain PEFT, they give the logits of the bank."""
    pushed = done(command("push", str(finished.run), "--repo", REPOSITORY), finished.environment)
    assert pushed.returncode == 0, pushed.stderr
    repository = finished.hub.repos[REPOSITORY]
    assert repository.private
    assert len(repository.commits) == 1
    names = [adapter["name"] for adapter in finished.report["adapters"]]
    for name in names:
        assert f"{name}/adapter_model.safetensors" in repository.files
    compared = ["lua-flora_rank4", "lua-ia3", "swift-lora", "d-flora", "racket-lora_rank4"]
    program, theirs = tmp_path / "peft_logits.py", tmp_path / "theirs.npz"
    program.write_text(PEFT_LOGITS, encoding="utf-8")
    environment = {**finished.environment, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    words = [sys.executable, str(program), REPOSITORY, str(theirs), *compared]
    loaded = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert loaded.returncode == 0, loaded.stderr
    ours = tmp_path / "ours.npz"
    words = [sys.executable, "-c", BANK_LOGITS, str(finished.run), str(ours), *compared]
    computed = done(words, finished.environment)
    assert computed.returncode == 0, computed.stderr
    peft, bank = np.load(theirs), np.load(ours)
    for name in compared:
        np.testing.assert_allclose(peft[name], bank[name], rtol=1e-4, atol=1e-5, err_msg=name)
        error = np.abs(peft[name] - bank[name]).max()
        assert np.abs(peft[name] - peft["base"]).max() > max(1e-5, 4 * error), name
