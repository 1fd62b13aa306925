"""flora-train data: counts of every kind of task, and examples whose learnt part is marked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flora_train.cli import main
from tests.e2e.chat_base import conversations, save_chat_base, write_recipe, write_rows
from tests.e2e.test_speech import speech_recipe

__all__ = ["speech_recipe"]  # a fixture

Shown = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without weights: the command reads none."""
    folder = save_chat_base(tmp_path_factory.mktemp("base") / "model")
    (folder / "model.safetensors").unlink()
    return folder


def output(capsys: Shown, *words: str) -> str:
    assert main(["data", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def counts(text: str, task: str) -> dict[str, list[str]]:
    """Label -> the values of its line in a task's table."""
    block = re.split(rf"^{task}: .*$", text, flags=re.MULTILINE)[1].split("\n\n")[0]
    lines = [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def test_counts_and_examples_of_prompts_and_completions(base: Path, tmp_path: Path, capsys: Shown) -> None:
    rows = [{"prompt": "ab", "completion": "c" * size} for size in (3, 3, 3, 60)] + [
        {"prompt": "ab", "completion": ""},
        {"prompt": "p" * 80, "completion": "c"},
    ]
    task = {
        "train": write_rows(tmp_path / "rows.jsonl", rows),
        "validation": write_rows(tmp_path / "held.jsonl", rows[:3]),
        "max_validation_examples": 2,
    }
    recipe = write_recipe(tmp_path, base, {"plain": task})
    shown = output(capsys, f"recipe={recipe}", "training.max_length=32", "--examples", "1")
    assert counts(shown, "plain") == {
        "rows": ["6", "3"],
        "used": ["4", "2"],
        "left out: over the limit on examples": ["0", "1"],
        "left out: without text to learn": ["1", "0"],
        "left out: nothing learnt within max_length": ["1", "0"],
        "cut off at max_length": ["1", "0"],
        "examples": ["4", "2"],
        "tokens": ["50", "12"],
        "learnt tokens": ["42", "8"],
        "share learnt": ["84%", "67%"],
        "tokens of the longest": ["32", "6"],
    }
    assert "Learnt text is between [[ and ]]; the rest is only read." in shown
    assert "plain, training example 1 of 4\n6 tokens, 4 learnt\n| ab[[ccc<e>]]\n" in shown


def test_conversations_show_which_turns_are_learnt(base: Path, tmp_path: Path, capsys: Shown) -> None:
    rows = conversations("ja no")
    rows[0]["messages"][0]["content"] = "say <|im_end|> \x1b[31m"
    rows[0]["messages"][3]["weight"] = 0
    task = {"train": write_rows(tmp_path / "rows.jsonl", rows), "validation": str(tmp_path / "rows.jsonl")}
    recipe = write_recipe(tmp_path, base, {"talk": task})
    shown = output(capsys, f"recipe={recipe}", "--examples", "1")
    example = shown[shown.index("| ") :]
    assert "| say \\<|im_end|> \\x1b[31m<|im_end|>\n" in example
    assert "| <|im_start|>assistant\n| [[ja!<|im_end|>" in example
    assert "[[ja?" not in example
    assert "| ja?<|im_end|>" in example
    assert "\x1b" not in shown
    assert "note: special tokens written in rows of talk (2: <|im_end|> 2) are text" in shown


def test_pairs_are_prompt_chosen_and_rejected(base: Path, tmp_path: Path, capsys: Shown) -> None:
    pairs = [{"prompt": f"Q{i} ", "chosen": "yes", "rejected": "oh no"} for i in range(6)]
    labelled = [{"prompt": f"Q{i} ", "completion": "yes", "label": i == 0} for i in range(6)]
    tasks = {
        "pairs": {"objective": "dpo", "train": write_rows(tmp_path / "pairs.jsonl", pairs)},
        "marks": {"objective": "kto", "train": write_rows(tmp_path / "marks.jsonl", labelled)},
    }
    for task in tasks.values():
        task["validation"] = task["train"]
    recipe = write_recipe(tmp_path, base, tasks)
    shown = output(capsys, f"recipe={recipe}", "--examples", "2")
    assert "pairs: objective dpo, max_length 128" in shown
    assert counts(shown, "pairs")["pairs"] == ["6", "6"]
    prompt = "prompt, 3 tokens\n| Q0 \n"
    completions = "chosen, 4 tokens, 4 learnt\n| [[yes<e>]]\nrejected, 6 tokens, 6 learnt\n| [[oh no<e>]]\n"
    assert prompt + completions in shown
    assert "marks, training example 1 of 6: a good completion\n7 tokens, 4 learnt\n| Q0 [[yes<e>]]\n" in shown
    assert "marks, training example 4 of 6: a bad completion\n" in shown


def test_labelled_texts_show_their_labels_and_how_many_have_them(
    base: Path, tmp_path: Path, capsys: Shown
) -> None:
    label = "b\x1b[31m"
    rows = [
        {
            "text": f"t{i}",
            "pair": "u",
            "label": "a" if i % 3 else label,
            "both": ["x", "y"][: i % 3],
            "n": i / 4,
            "tokens": ["go", "on"],
            "tags": ["V", "P"],
        }
        for i in range(12)
    ]
    train = write_rows(tmp_path / "rows.jsonl", rows)
    source = {"train": train, "validation": train}
    tasks = {
        "one": {**source, "label": "label", "text": ["text", "pair"]},
        "many": {**source, "label": "both", "multi_label": True},
        "number": {**source, "label": "n", "regression": True},
        "words": {**source, "label": "label", "prompt": "{text}?", "verbalizer": {"a": "no", label: "yes"}},
        "tags": {**source, "token_labels": "tags"},
    }
    recipe = write_recipe(tmp_path, base, tasks)
    shown = output(capsys, f"recipe={recipe}", "--examples", "1")
    assert "\x1b" not in shown
    assert "one: max_length 128, a head for one label" in shown
    assert counts(shown, "one")["label a"] == ["8 (67%)", "8 (67%)"]
    assert counts(shown, "one")["label b\\x1b[31m"] == ["4 (33%)", "4 (33%)"]
    assert "learnt tokens" not in counts(shown, "one")
    assert "one, training example 1 of 12: b\\x1b[31m\n3 tokens\n| t0u\n" in shown
    assert counts(shown, "many")["label x"] == ["8 (67%)", "8 (67%)"]
    assert counts(shown, "many")["label y"] == ["4 (33%)", "4 (33%)"]
    assert "many, training example 1 of 12: no label\n" in shown
    assert counts(shown, "number")["numbers, lowest to highest"] == ["0 to 2.75", "0 to 2.75"]
    assert "number, training example 1 of 12: 0\n" in shown
    assert "words of labels (a no, b\\x1b[31m yes)" in shown
    assert counts(shown, "words")["label a"] == ["8 (67%)", "8 (67%)"]
    assert "words, training example 1 of 12: b\\x1b[31m\n8 tokens, 5 learnt\n| t0?[[ yes<e>]]\n" in shown
    assert counts(shown, "tags")["label P"] == ["12 (50%)", "12 (50%)"]
    assert "|  go on\nlabels: go/V on/P\n" in shown


def test_packed_examples_show_their_first_documents(base: Path, tmp_path: Path, capsys: Shown) -> None:
    rows = [{"text": f"row {i:02}"} for i in range(40)]
    task = {"train": write_rows(tmp_path / "rows.jsonl", rows), "packing": True}
    recipe = write_recipe(tmp_path, base, {"lines": {**task, "validation": task["train"]}})
    words = [f"recipe={recipe}", "training.max_length=70", "--examples", "1"]
    shown = output(capsys, *words)
    assert counts(shown, "lines")["documents"] == ["40", "40"]
    assert counts(shown, "lines")["packed sequences"] == ["4", "0"]
    assert counts(shown, "lines")["tokens of the longest"] == ["70", "7"]
    assert "document 1 of 10, 7 tokens, 6 learnt\n| r[[ow 00<e>]]\n" in shown
    assert "document 4 of 10" not in shown
    assert "7 more packed documents (--full prints all)" in shown
    assert "document 10 of 10" in output(capsys, *words, "--full")


def test_clips_are_shown_by_their_transcripts(speech_recipe: Path, capsys: Shown) -> None:
    shown = output(capsys, f"recipe={speech_recipe}", "--task", "cs", "--examples", "1")
    assert "cs: speech (cs)" in shown
    assert "en: speech" not in shown
    assert any(label.startswith("left out: ") for label in counts(shown, "cs"))
    assert counts(shown, "cs")["length of the clips"]
    assert re.search(r"cs, training example 1 of \d+: \S+\.wav, \d+\.\d s\n", shown)
    assert re.search(r"\| <\|startoftranscript\|>.*\[\[.*\]\]\n", shown)


def test_marks_are_those_that_no_example_contains(
    base: Path, tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With colours there are none."""
    rows = [{"prompt": "p", "completion": "t[[1]]"}] * 4
    task = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    recipe = write_recipe(tmp_path, base, {"plain": task})
    shown = output(capsys, f"recipe={recipe}")
    assert "Learnt text is between \u27e6 and \u27e7; the rest is only read." in shown
    assert "| p\u27e6t[[1]]<e>\u27e7\n" in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = output(capsys, f"recipe={recipe}")
    assert "p\x1b[30;102mt[[1]]\x1b[0m" in coloured
    assert "\u27e6" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "| \x1b[0mp\u27e6t[[1]]\x1b[1m<e>\x1b[0m\u27e7\n" in output(capsys, f"recipe={recipe}")


def test_long_examples_are_shortened_unless_all_is_asked_for(
    base: Path, tmp_path: Path, capsys: Shown
) -> None:
    rows = [{"prompt": "p" * 3000, "completion": "c"}] * 4
    task = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    recipe = write_recipe(tmp_path, base, {"plain": task})
    sizes = ["training.tokens_per_step=16000", "training.tokens_per_microbatch=8000"]
    words = [f"recipe={recipe}", "training.max_length=3500", *sizes]
    shown = output(capsys, *words)
    assert f"| {'p' * 700} ... 2,100 characters (--full prints all) ... {'p' * 200}[[c<e>]]\n" in shown
    assert f"| {'p' * 3000}[[c<e>]]\n" in output(capsys, *words, "--full")


def test_many_tasks_are_one_table(base: Path, tmp_path: Path, capsys: Shown) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "cde"}] * 5)
    tasks = {f"t{i:02}": {"train": file, "validation": file} for i in range(14)}
    recipe = write_recipe(tmp_path, base, tasks)
    shown = output(capsys, f"recipe={recipe}", "training.tokens_per_step=2000")
    assert re.search(r"^t13 +training +5 +5 +5 +30 +67% +6$", shown, re.MULTILINE)
    assert "training example" not in shown
    assert "--task NAME,... prints examples" in shown
    assert shown.count("training example") == 0
    assert "t07, training example 1 of 5" in output(capsys, f"recipe={recipe}", "--task", "t07,t08")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--task", "takl"],
            r"--task = 'takl': the recipe has no such task; there are talk. Did you mean 'talk'?",
        ),
        (["--examples", "-1"], "examples = -1: must be at least 0"),
        (
            ["examples=3"],
            "examples = '3': options of this command begin with --. Did you mean '--examples 3'?",
        ),
        (["steps=3"], "steps: unknown key. Did you mean 'training.steps'?"),
        (["--steps", "3"], "--steps: keys of the recipe are written key=value: training.steps=VALUE"),
        (["tasks.talk.train=nothing.jsonl"], "tasks.talk.train = 'nothing.jsonl': no such file in"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], error: str, base: Path, tmp_path: Path, capsys: Shown
) -> None:
    task = {"train": write_rows(tmp_path / "rows.jsonl", conversations("ja no hm"))}
    recipe = write_recipe(tmp_path, base, {"talk": task})
    assert main(["data", f"recipe={recipe}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {error}")
