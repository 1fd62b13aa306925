"""The study of recipe=clinical: baselines, comparison runs on a tiny encoder, scores and tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from flora_train.evaluation.figures.result_types import FigureResult, FigureScore
from flora_train.evaluation.result_model import Interval
from studies.clinical_study.bag_of_words import majority, tfidf
from studies.clinical_study.encoder import (
    BATCH,
    MAX_LENGTH,
    STEPS,
    Encoder,
    GatedResidualHead,
    Settings,
    batches,
    full,
    gated,
    label_weights,
    predict,
    rate,
)
from studies.clinical_study.scores import complete_methods, mean_score, task_scores
from studies.clinical_study.table import Study, write_study
from studies.clinical_study.tasks import Labelled, Predictions, StudyError, StudyTask, load_tasks

ROOT = Path(__file__).resolve().parents[3]
WORDS = {"x": ("heart", "vein", "aorta"), "y": ("liver", "bile", "gut"), "z": ("skin", "hair", "nail")}
COMMON = ("pain", "of", "the", "acute", "other")


def labelled(number: int, seed: int) -> Labelled:
    """Texts whose label is told by one word."""
    random = np.random.default_rng(seed)
    labels = [str(random.choice(list(WORDS))) for _ in range(number - len(WORDS))] + list(WORDS)
    texts = []
    for label in labels:
        words = [*random.choice(COMMON, 3), random.choice(WORDS[label])]
        texts.append(" ".join(map(str, words)))
    return Labelled(tuple(texts), tuple(labels))


TASK = StudyTask("ch01", 50, labelled(60, 0), labelled(40, 1))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A tiny BERT with random weights that knows the words of the texts."""
    folder = tmp_path_factory.mktemp("encoder")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *COMMON,
        *(word for words in WORDS.values() for word in words),
    ]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return Encoder(folder)


def macro_f1(labels: Sequence[str], task: StudyTask = TASK) -> float:
    return float(f1_score(task.test.labels, labels, average="macro", zero_division=0))


def test_majority_is_the_most_frequent_label_and_the_first_of_several() -> None:
    task = replace(TASK, train=Labelled(("a",) * 5, ("y", "x", "y", "x", "z")))
    assert majority(task) == ["x"] * 40


def test_tfidf_learns_words() -> None:
    assert macro_f1(tfidf(TASK)) > 0.9


def test_gated_residual_head_computes_the_formula_of_its_docstring() -> None:
    torch.manual_seed(0)
    head = GatedResidualHead(6, 3).eval()
    a = torch.randn(4, 6)

    def linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.T + layer.bias

    inner = linear(head.inner, a)
    e = linear(head.outer, torch.where(inner > 0, inner, inner.exp() - 1))
    y = a + linear(head.gate, e).sigmoid() * linear(head.value, e)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(a), linear(head.classifier, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "least"),
    [(full, Settings(lr=1e-2, steps=40), 0.9), (gated, Settings(lr=1e-2, steps=200), 0.55)],
)
def test_comparison_runs_learn_and_depend_on_their_seed_alone(
    method: Callable[..., list[str]], settings: Settings, least: float, encoder: Encoder
) -> None:
    first = method(TASK, encoder, 1, settings)
    assert macro_f1(first) > least
    assert method(TASK, encoder, 1, settings) == first
    untrained = method(TASK, encoder, 1, replace(settings, steps=0))
    assert macro_f1(untrained) < least - 0.1


def test_predict_gives_every_text_its_own_label(encoder: Encoder) -> None:
    torch.manual_seed(3)
    model = encoder.classifier(3).eval()
    labels = predict(TASK, model, encoder)
    for text, label in zip(TASK.test.texts, labels, strict=True):
        logits = model(**encoder.inputs([text])).logits
        assert label == TASK.labels[int(logits.argmax())]
    assert isinstance(model, BertForSequenceClassification)


def test_features_are_those_of_the_pooler(encoder: Encoder) -> None:
    model = BertModel.from_pretrained(encoder.folder).eval()
    with torch.no_grad():
        expected = model(**encoder.inputs(TASK.test.texts[:1])).pooler_output
    torch.testing.assert_close(encoder.features(TASK.test.texts)[:1], expected, atol=1e-6, rtol=1e-5)


def test_label_weights_are_those_of_scikit_learn() -> None:
    targets = torch.tensor(TASK.targets)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(TASK.targets))
    assert label_weights(targets, 3).tolist() == pytest.approx(expected.tolist())


def test_batches_read_every_text_once_an_epoch() -> None:
    stream = batches(48, seed=0)
    epoch = torch.cat([next(stream) for _ in range(3)]).tolist()
    assert sorted(epoch) == list(range(48))
    assert torch.cat([next(stream) for _ in range(3)]).tolist() != epoch
    assert len(next(batches(5, seed=0))) == 5
    assert BATCH == 16


def test_rate_warms_up_and_ends_at_zero() -> None:
    rates = [rate(step, 60) for step in range(61)]
    assert rates[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert rates[60] == 0
    assert rates[6:] == sorted(rates[6:], reverse=True)


@pytest.fixture
def predictions(tmp_path: Path) -> Predictions:
    """majority and TF-IDF, a method that is always right, and one that is no better than the majority."""
    folder = Predictions(tmp_path)
    folder.write("majority", TASK, 0, majority(TASK))
    folder.write("tfidf", TASK, 0, tfidf(TASK))
    for seed in (1, 2, 3):
        wrong = list(TASK.test.labels)
        wrong[seed] = next(label for label in WORDS if label != wrong[seed])
        folder.write("lora", TASK, seed, wrong)
        folder.write("ia3", TASK, seed, majority(TASK))
    return folder


def test_task_scores_are_scikit_learns_macro_f1_and_means_over_seeds(predictions: Predictions) -> None:
    scores = task_scores(TASK, predictions)
    assert scores["tfidf"].value == pytest.approx(macro_f1(tfidf(TASK)))
    assert scores["majority"].value == pytest.approx(macro_f1(majority(TASK)))
    of_seeds = [macro_f1(labels) for _, labels in predictions.read("lora", TASK)]
    assert scores["lora"].seeds == pytest.approx(of_seeds)
    assert scores["lora"].value == pytest.approx(np.mean(of_seeds))
    assert scores["lora"].deviation == pytest.approx(np.std(of_seeds, ddof=1))
    assert scores["tfidf"].deviation is None
    estimate = scores["lora"].estimate()
    assert estimate.low < estimate.value <= estimate.high
    same = scores["ia3"].minus(scores["majority"])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_mean_score_is_the_mean_over_tasks(predictions: Predictions) -> None:
    score = task_scores(TASK, predictions)["lora"]
    other = replace(score, value=score.value - 0.5, samples=score.samples - 0.5, seeds=(0.1, 0.2, 0.3))
    mean = mean_score([score, other])
    assert mean.value == pytest.approx(score.value - 0.25)
    assert mean.seeds[0] == pytest.approx((score.seeds[0] + 0.1) / 2)
    assert mean.estimate().high == pytest.approx(score.estimate().high - 0.25)


def test_complete_methods_have_every_task(predictions: Predictions) -> None:
    scores = task_scores(TASK, predictions)
    assert complete_methods([scores, {"lora": scores["lora"]}]) == {"lora"}
    assert complete_methods([]) == set()


def test_study_says_what_beats_no_baseline(predictions: Predictions) -> None:
    text = "\n".join(write_study(Study([TASK], {TASK.key: task_scores(TASK, predictions)})))
    assert "| ch01 | 3 | 40 | 60 |" in text
    assert "- 50 training texts, against majority label: not clearly better: IA3." in text
    assert (
        "IA3" in text.partition("against TF-IDF + logistic regression: not clearly better: ")[2].split(".")[0]
    )
    row = next(line for line in text.splitlines() if line.startswith("| 50 | IA3 "))
    assert "+0.000 [+0.000, +0.000]" in row
    assert "E-mails" not in text


def figure_of(**values: float) -> FigureResult:
    scores = []
    for family, value in values.items():
        interval = Interval(value=value, low=value, high=value, excludes_zero=False)
        scores.append(FigureScore(name=family, family=family, value=interval))
    return FigureResult(
        task=TASK.key, figure="macro_f1", lower_is_better=False, examples=40, confidence=0.95,
        contenders=scores, differences=(),
    )  # fmt: skip


def test_study_compares_the_runs_report_with_the_predictions(predictions: Predictions) -> None:
    scores = task_scores(TASK, predictions)
    equal = figure_of(lora=scores["lora"].value, ia3=scores["ia3"].value, another=0.5)
    other = figure_of(lora=scores["lora"].value - 0.25)

    def section(*figures: FigureResult) -> str:
        report = SimpleNamespace(figures=figures)
        lines = write_study(Study([TASK], {TASK.key: scores}, report))  # type: ignore[arg-type]
        return "\n".join(lines).partition("## The run's own report")[2]

    assert "Of 2 values of macro-F1 in report.json, 0 differ" in section(equal)
    assert "the largest difference is 0.25" in section(other)
    assert f"| ch01_n50 | LoRA | {scores['lora'].value - 0.25:.4f} |" in section(other)
    assert "No adapter has predictions" in section()


def test_predictions_of_another_test_set_are_refused(predictions: Predictions) -> None:
    assert predictions.has("lora", TASK, 1)
    changed = replace(TASK, test=labelled(40, 5))
    assert not predictions.has("lora", changed, 1)
    with pytest.raises(StudyError, match="predictions for another test set; delete it and run again"):
        task_scores(changed, predictions)
    with pytest.raises(StudyError, match="lora predicts 1 labels for 40 texts"):
        predictions.write("lora", TASK, 1, ["x"])


def write_data(folder: Path) -> None:
    rows = {"ch01.test": TASK.test, "ch01.n50": TASK.train}
    for name, content in rows.items():
        pairs = zip(content.texts, content.labels, strict=True)
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "counts.json").write_text(json.dumps([{"name": "ch01"}]))


def test_load_tasks_reads_the_builders_files(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"no such file; build it with: python assets/build_clinical_corpus\.py"
    ):
        load_tasks(tmp_path)
    write_data(tmp_path)
    assert load_tasks(tmp_path) == [TASK]
    with pytest.raises(StudyError, match="--tasks ch02: no such task; there are ch01"):
        load_tasks(tmp_path, ["ch02"])


def test_command_line_makes_predictions_and_a_table(tmp_path: Path, encoder: Encoder) -> None:
    write_data(tmp_path)
    places = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--model", str(encoder.folder)]

    def study(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "studies" / "clinical.py"), *arguments, *places]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in ("baselines", "gated"):
        study(command)
    table = study("table")
    for method in ("majority label", "TF-IDF", "gated residual head"):
        assert f"| 50 | {method}" in table
    for text in TASK.test.texts:
        assert text not in table


def test_comparison_runs_have_the_budget_of_the_recipe() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "clinical.yaml").read_text(encoding="utf-8"))
    assert {adapter["max_steps"] for adapter in recipe["adapters"].values()} == {STEPS}
    assert recipe["mixture"]["examples_per_draw"] == BATCH
    assert recipe["training"]["max_length"] == MAX_LENGTH
