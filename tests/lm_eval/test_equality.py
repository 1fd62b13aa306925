"""Every table is that of lm_eval's `hf` model with the same adapter in plain PEFT, to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flora_train.cli import main
from tests.e2e.conftest import save_tiny_checkpoint
from tests.lm_eval.harness import (
    ADAPTERS,
    CONTENDERS,
    assert_equal,
    our_tables,
    results_of_lm_eval,
    tables_of_lm_eval,
)

TASKS = ["letters_choice", "letters_last", "letters_text", "letters_write", "letters_penalty"]
"""Of every kind of request."""


@pytest.mark.parametrize(
    "options", [{}, {"num_fewshot": 3, "limit": 10}], ids=["zero_shot", "three_examples"]
)
def test_tables_are_those_of_lm_eval_one_by_one(
    options: dict[str, Any],
    run: Path,
    checkpoint: Path,
    task_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    ours = our_tables(
        capsys, str(run), "--tasks", ",".join(TASKS), "--include-path", str(task_folder), *words
    )
    assert len(set(ours.values())) == 4, "the base and the adapters differ"
    assert_equal(ours, tables_of_lm_eval(checkpoint, run, TASKS, task_folder, **options))


def test_groups_and_tags_are_those_of_lm_eval(
    run: Path, checkpoint: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(run), "--include-path", str(task_folder), "--tasks")
    ours = our_tables(capsys, *words, "letters_group")
    assert "Groups" in ours["base"]
    assert_equal(ours, tables_of_lm_eval(checkpoint, run, ["letters_group"], task_folder))
    by_pattern = our_tables(capsys, *words, "letters_cho*,letters_las*")
    assert_equal(
        by_pattern, tables_of_lm_eval(checkpoint, run, ["letters_choice", "letters_last"], task_folder)
    )


def test_a_task_file_is_evaluated_as_its_task(
    run: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = our_tables(capsys, str(run), "--tasks", "letters_choice", "--include-path", str(task_folder))
    assert our_tables(capsys, str(run), "--tasks", str(task_folder / "letters_choice.yaml")) == by_name


def test_perplexities_of_words_agree_in_all_digits_of_float32(
    run: Path, checkpoint: Path, task_folder: Path, tmp_path: Path
) -> None:
    """Those of an untrained model have more digits than float32: a batch size of lm_eval changes the rest."""
    output = tmp_path / "results.json"
    words = ["--tasks", "letters_words", "--include-path", str(task_folder), "--output", str(output)]
    assert main(["lm-eval", str(run), *words]) == 0
    ours = json.loads(output.read_text())["contenders"]
    assert list(ours) == CONTENDERS
    for name in CONTENDERS:
        adapter = None if name == "base" else run / "adapters" / name
        theirs = results_of_lm_eval(checkpoint, adapter, ["letters_words"], task_folder)
        found, expected = (
            results["results"]["letters_words"]["word_perplexity,none"] for results in (ours[name], theirs)
        )
        assert found > 1e5
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_start_token_and_a_larger_model_vocabulary_are_treated_alike(
    tmp_path: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm_eval cuts off embeddings that the tokenizer has no token for, where it loads an adapter."""
    base = save_tiny_checkpoint(tmp_path / "base", bos_token="<unk>")
    enlarge(base, by=9)
    run = train(tmp_path, base)
    tasks = ["letters_choice", "letters_last", "letters_write"]
    ours = our_tables(capsys, str(run), "--tasks", ",".join(tasks), "--include-path", str(task_folder))
    assert_equal(ours, tables_of_lm_eval(base, run, tasks, task_folder))


def test_chat_templates_are_applied_as_by_lm_eval(
    tmp_path: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    run = train(tmp_path, base)
    tasks = ["letters_choice", "letters_write"]
    words = (str(run), "--tasks", ",".join(tasks), "--include-path", str(task_folder), "--num-fewshot=2")
    ours = our_tables(capsys, *words, "--apply-chat-template")
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2}
    assert_equal(ours, tables_of_lm_eval(base, run, tasks, task_folder, **options))
    assert our_tables(capsys, *words) != ours


def enlarge(base: Path, by: int) -> None:
    """Give a checkpoint more embeddings than the tokenizer has tokens, some of them likely."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + by, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[-by:] *= 3
    model.save_pretrained(base)


def train(folder: Path, base: Path) -> Path:
    """A short run of the three adapters on another base."""
    rows = [{"prompt": "abcd"[i % 4], "completion": "abcdabcd"[i % 4 + 1 : i % 4 + 4]} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    methods = {"flora": {"rank": 2, "lr": 0.1}, "lora": {"rank": 2, "lr": 0.05}, "ia3": {"lr": 0.1}}
    content = {
        "name": "tiny",
        "num_threads": 1,
        "model": {"path": str(base), "dtype": "float32"},
        "tasks": {"letters": {"train": str(folder / "rows.jsonl")}},
        "adapters": {name: {"method": name, **options} for name, options in methods.items()},
        "training": {"steps": 8, "tokens_per_step": 100, "tokens_per_microbatch": 60, "max_length": 32},
        "evaluation": {"max_new_tokens": 4, "bootstrap_samples": 200},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["train", f"recipe={recipe}", f"output_dir={folder / 'run'}"]) == 0
    assert sorted(path.name for path in (folder / "run" / "adapters").iterdir()) == sorted(ADAPTERS)
    return folder / "run"
