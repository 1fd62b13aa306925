"""Held-out prompts are answered by base and adapters, and the figures of the answers are those of other
libraries, in every place that shows results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora_train import evaluate
from flora_train.cli import main
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.tables import scores_of
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.report.types import Report
from flora_train.runtime.journal import whole_lines
from flora_train.runtime.run_folder import open_run
from tests.documents import ROOT, blocks
from tests.e2e.conftest import WORDS, Launch, launch_environment
from tests.forked import python, start

METRICS = ["exact_match", "rouge_l", "chrf", "bleu", "perplexity"]
TEMPLATE = """{%- for message in messages %}
    {{- message.role[0] + ':' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'a:' }}{%- endif %}
"""
LIMIT = 6


@pytest.fixture(scope="module")
def answering(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with metrics: of prompts and completions, and of conversations of one or two turns."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "turns.jinja").write_text(TEMPLATE)
    chats = []
    for i in range(60):
        turns: list[dict[str, str]] = []
        for letter in "abcdefgh"[i % 8 : i % 8 + 1 + i % 2]:
            turns += [{"role": "user", "content": letter}, {"role": "assistant", "content": letter * 3}]
        chats.append({"messages": turns})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    content = yaml.safe_load(recipe.read_text())
    del content["adapters"]["lora"]
    content["tasks"]["letters"] |= {
        "metrics": METRICS,
        "max_new_tokens": LIMIT,
        "validation_fraction": 0.2,
    }
    content["tasks"]["digits"] |= {"metrics": "rouge_l", "max_metric_examples": 2}
    content["tasks"]["chats"] = {
        "train": str(folder / "chats.jsonl"),
        "chat_template": str(folder / "turns.jinja"),
        "metrics": ["exact_match"],
        "validation_fraction": 0.2,
    }
    content["training"] |= {"tokens_per_step": 260, "tokens_per_microbatch": 130}
    path = folder / "answers.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(answering: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "answers"
    done = launch(f"recipe={answering}", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def answers_of(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    entries = []
    for file in sorted((folder / "eval" / "answers").glob("answers-*.jsonl")):
        entries += map(json.loads, file.read_text().splitlines())
    return {(entry["task"], entry["adapter"], entry["example"]): entry for entry in entries}


def report_of(folder: Path) -> Report:
    return read_report(open_run(str(folder))[0])


def texts(folder: Path, task: str, adapter: str) -> tuple[list[str], list[str]]:
    entries = [entry for key, entry in sorted(answers_of(folder).items()) if key[:2] == (task, adapter)]
    return [entry["answer"] for entry in entries], [entry["reference"] for entry in entries]


def test_figures_are_those_of_other_libraries(finished: Path) -> None:
    report = report_of(finished)
    named = {(result.task, result.figure): result for result in report.figures}
    assert list(named) == [
        ("letters", "perplexity"),
        *(("letters", metric) for metric in METRICS[:4]),
        ("digits", "rouge_l"),
        ("chats", "exact_match"),
    ]
    rouge = RougeScorer(["rougeL"])
    for family, adapter in {"base": "__base__", "flora": "letters-flora", "ia3": "letters-ia3"}.items():
        predictions, references = texts(finished, "letters", adapter)
        assert len(predictions) == named["letters", "bleu"].examples == 12
        scores = [rouge.score(y, p)["rougeL"].fmeasure for p, y in zip(predictions, references, strict=True)]
        expected = {
            "exact_match": sum(p == y for p, y in zip(predictions, references, strict=True)) / 12,
            "rouge_l": sum(scores) / 12,
            "chrf": CHRF().corpus_score(predictions, [references]).score,
            "bleu": BLEU().corpus_score(predictions, [references]).score,
        }
        for metric, value in expected.items():
            interval = named["letters", metric].by_family[family].value
            assert interval.value == pytest.approx(value, rel=1e-9)
            assert interval.low <= interval.value <= interval.high
    result = named["letters", "perplexity"]
    (losses,) = [other for other in report.results if other.task == "letters"]
    assert result.by_family["flora"].value.value == pytest.approx(losses.by_family["flora"].perplexity)
    assert result.to_base["flora"].excludes_zero
    assert named["digits", "rouge_l"].examples == 2
    assert "Answers to all held-out prompts of digits: 2 of 3" in " ".join(report.not_measured)


def test_answers_are_those_of_plain_transformers(finished: Path) -> None:
    """Of the base, and of an adapter that PEFT loads, for a prompt and for a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(report_of(finished).facts.model)
    base = AutoModelForCausalLM.from_pretrained(report_of(finished).facts.model, dtype=torch.float32)

    def continued(model: Any, prompt: str, limit: int) -> str:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=limit, do_sample=False)
        return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    checked = 0
    models = {"__base__": base}
    answers = answers_of(finished)
    for task, prompt_of, limit in (
        ("letters", lambda reference: "abcdefgh"["abcdefgh".index(reference[0]) - 1], LIMIT),
        ("chats", lambda reference: f"u:{reference[0]}<end>a:", 4),
    ):
        for name in ("__base__", f"{task}-ia3"):
            if name not in models:
                models[name] = PeftModel.from_pretrained(
                    AutoModelForCausalLM.from_pretrained(
                        report_of(finished).facts.model, dtype=torch.float32
                    ),
                    finished / "adapters" / name,
                )
            for (of_task, adapter, example), entry in answers.items():
                if (of_task, adapter) == (task, name) and (task == "letters" or example % 2 == 0):
                    expected = continued(models[name], prompt_of(entry["reference"]), limit)
                    if task == "letters" or entry["prompt_sha"] in one_turn(answers):
                        assert entry["answer"] == expected, (task, name, example)
                        checked += 1
    assert checked > 20


def one_turn(answers: dict[tuple[str, str, int], dict[str, Any]]) -> set[str]:
    """The hashes of prompts that are conversations of one turn."""
    shas = set()
    for letter in "abcdefgh":
        tokens = tuple(WORDS.index(word) for word in ("u", ":", letter, "<end>", "a", ":"))
        (reference,) = {
            entry["reference"]
            for entry in answers.values()
            if entry["task"] == "chats" and entry["reference"].startswith(letter)
        } or {""}
        shas.add(sha256(repr((tokens, reference)).encode()).hexdigest())
    return shas


def test_references_are_the_completions_of_the_data(finished: Path, answering: Path) -> None:
    rows = Path(yaml.safe_load(answering.read_text())["tasks"]["letters"]["train"]).read_text().splitlines()
    completions = {json.loads(row)["completion"] for row in rows}
    answers = answers_of(finished)
    # the tiny tokenizer decodes its letters with spaces between them
    letters = [entry["reference"].replace(" ", "") for key, entry in answers.items() if key[0] == "letters"]
    assert len(letters) == 3 * 12
    assert set(letters) <= completions
    chats = [entry for key, entry in answers.items() if key[0] == "chats"]
    assert {entry["reference"].replace(" ", "") for entry in chats} <= {3 * letter for letter in "abcdefgh"}
    assert all(entry["tokens"] <= 4 for entry in chats)


def test_figures_stand_wherever_results_are_shown(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(finished)
    page = (finished / "eval" / "report.html").read_text()
    for title in ("ROUGE-L, higher is better.", "chrF, higher is better.", "Perplexity, lower is better."):
        assert title in page
    metrics = final_metrics(report)
    assert {f"final/letters/flora/{metric}" for metric in METRICS} <= metrics.keys()
    card = (finished / "adapters" / "letters-flora" / "README.md").read_text()
    assert "| exact match | ROUGE-L | chrF | BLEU |" in card
    assert "type: rouge_l" in card
    assert {"ROUGE-L", "BLEU", "perplexity"} <= {score.metric.name for score in scores_of({"": report})}
    table = tmp_path / "table.csv"
    assert main(["report", str(finished), "--table", str(table)]) == 0
    assert "ROUGE-L,letters,flora," in table.read_text()
    compared = tmp_path / "both.html"
    assert main(["report", str(finished), str(finished), "--out", str(compared)]) == 0
    assert "chrF on held-out examples" in compared.read_text()
    capsys.readouterr()
    assert main(["report", str(finished)]) == 0
    assert "rouge" in (capsys.readouterr().out + page).lower()


def test_a_journal_that_was_cut_is_completed(finished: Path, tmp_path: Path) -> None:
    """What is there stays; the rest, and answers of other weights, are generated again."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    file = folder / "eval" / "answers" / "answers-0.jsonl"
    lines = file.read_text().splitlines()
    foreign = json.loads(lines[0])
    del foreign["check"]
    outdated = json.dumps({**foreign, "answer": "from other weights", "adapter_sha": "0" * 64})
    file.write_text("\n".join([outdated, *lines[1 : len(lines) // 2]]) + '\n{"adapter": "let')
    assert main(["evaluate", str(folder)]) == 0
    assert answers_of(folder) == answers_of(finished)
    assert report_of(folder).figures == report_of(finished).figures


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_kill_while_prompts_are_answered_loses_no_answer(
    answering: Path, finished: Path, tmp_path: Path, processes: int
) -> None:
    folder = tmp_path / "killed"
    words = [f"recipe={answering}", f"output_dir={folder}", "evaluation.batch_rows=1"]
    words += ["num_processes=2"] * (processes - 1)
    environment = launch_environment(tmp_path / "cache")
    ranks = start(["train.py", *words], environment, processes)
    journal = folder / "eval" / "answers" / "answers-0.jsonl"
    deadline = time.monotonic() + 200
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert ranks[0].poll() is None
        time.sleep(0.002)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait(60)
    kept = whole_lines(journal.read_bytes())
    assert 3 <= kept.count(b"\n") < len(answers_of(finished))
    done = python("train.py", *words, "resume=true", environment=environment, processes=processes)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(kept)
    assert answers_of(folder).keys() == answers_of(finished).keys()
    if processes == 1:
        assert report_of(folder).figures == report_of(finished).figures


def test_two_processes_answer_alike(answering: Path, finished: Path, launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    done = launch(f"recipe={answering}", f"output_dir={folder}", "num_processes=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "eval" / "answers").glob("answers-*.jsonl"))) == 2
    two, one = answers_of(folder), answers_of(finished)
    assert two.keys() == one.keys()
    of_base = [key for key in one if key[1] == "__base__"]
    assert [two[key]["answer"] for key in of_base] == [one[key]["answer"] for key in of_base]
    base = [
        [row.value for result in report_of(run).figures for row in result.contenders if row.family == "base"]
        for run in (folder, finished)
    ]
    assert base[0][1:] == base[1][1:]


def test_a_function_of_ones_own_evaluates_a_finished_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the one in docs/figures.md, and of one that is no mean over examples."""
    (documented,) = blocks(ROOT / "docs" / "figures.md", "python")
    (tmp_path / "first_letters.py").write_text(
        f"{documented.text}\n"
        "def distinct(predictions, references):\n"
        "    return len(set(predictions))\n"
        "distinct.lower_is_better = True\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ["first_letters:score", "first_letters:distinct"]
    report = evaluate(str(finished), [f"tasks.letters.metrics={json.dumps(names)}"])
    results = {result.figure: result for result in report.figures if result.task == "letters"}
    assert list(results) == names
    predictions, references = texts(finished, "letters", "letters-flora")
    share = sum(p.split()[:1] == y.split()[:1] for p, y in zip(predictions, references, strict=True)) / len(
        references
    )
    assert results[names[0]].by_family["flora"].value.value == pytest.approx(share)
    assert results[names[1]].by_family["flora"].value.value == len(set(predictions))
    assert results[names[1]].lower_is_better
    assert "final/letters/flora/first_letters.score" in final_metrics(report)
