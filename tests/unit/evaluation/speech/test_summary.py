"""Error rates, differences and utterances of a speech run."""

from __future__ import annotations

from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, expand
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.evaluation.report.terminal import print_error_rates
from flora_train.evaluation.speech.score_types import SpeechResults
from flora_train.evaluation.speech.summary import Transcript, summarise
from tests.speech import loaded_tiny_whisper, write_corpus
from tests.unit.data.audio.test_speech_task import config_of, load
from tests.unit.evaluation.report.test_html import Outline, page_of
from tests.unit.evaluation.report.test_html import run as results_of

ROUNDS = {BASE: 2, "cs-flora": 1, "cs-lora": 0}
"""How many words of a sentence each gets wrong."""


def config(files: dict[str, str], **evaluation: Any) -> RunConfig:
    raw = config_of(files).model_dump(mode="json")
    raw["adapters"] = {name: {"method": name, "lr": 1e-3} for name in ("flora", "lora")}
    raw["evaluation"] = {"bootstrap_samples": 200, **evaluation}
    return RunConfig.model_validate(raw)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> SpeechResults:
    folder = tmp_path_factory.mktemp("speech")
    files = write_corpus(folder, "cs", held=6)
    split = load(files, folder).test
    assert isinstance(split, SpeechSplit)
    run = config(files, embedded_clips=1)
    bank = AdapterBank.attach(loaded_tiny_whisper(), expand(run))
    transcripts = [
        Transcript(
            adapter,
            "cs",
            i,
            " ".join(["wrong"] * n + str(sentence).upper().split()[n:]) + "!",
            "loop" if n == 2 else "end",
        )
        for adapter, n in ROUNDS.items()
        for i, sentence in enumerate(split.sentences)
    ]
    return summarise(run, {"cs": split}, bank, transcripts=transcripts)


def test_rates_count_what_was_wrong(summary: SpeechResults) -> None:
    (part,) = summary.languages
    assert (part.normalizer, part.metric, part.clips) == ("letters-1", "wer_normalized", 6)
    words = part.contenders[0].wer_normalized.units
    found = {c.family: c.wer_normalized for c in part.contenders}
    assert {family: rate.substitutions for family, rate in found.items()} == {
        "base": 12,
        "flora": 6,
        "lora": 0,
    }
    assert {family: rate.value for family, rate in found.items()} == pytest.approx(
        {"base": 12 / words, "flora": 6 / words, "lora": 0}
    )
    assert all(
        (c.wer.value or 0) > (c.wer_normalized.value or 0) for c in part.contenders
    )  # case and punctuation
    assert [c.ended for c in part.contenders] == [{"loop": 6}, {"end": 6}, {"end": 6}]


def test_differences_are_paired_and_exclude_zero(summary: SpeechResults) -> None:
    (part,) = summary.languages
    found = {(d.first, d.second): d.wer_normalized for d in part.differences}
    assert list(found) == [("flora", "base"), ("lora", "base"), ("flora", "lora")]
    base, lora = found["flora", "base"].finite, found["flora", "lora"].finite
    assert base is not None
    assert base[0] < 0
    assert lora is not None
    assert lora[1] > 0
    assert all(d.excludes_zero for d in found.values())


def test_many_adapters_are_compared_with_base_and_best_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flora_train.evaluation.bootstrap.MAX_PAIRED", 2)
    files = write_corpus(tmp_path, "cs")
    split = load(files, tmp_path).test
    assert isinstance(split, SpeechSplit)
    raw = config(files, embedded_clips=0).model_dump(mode="json")
    raw["adapters"] = {f"lora{i}": {"method": "lora", "lr": 1e-3} for i in range(4)}
    run = RunConfig.model_validate(raw)
    bank = AdapterBank.attach(loaded_tiny_whisper(), expand(run))
    transcripts = []
    for adapter in ("__base__", *(spec.name for spec in bank.specs)):
        for i, sentence in enumerate(split.sentences):
            text = str(sentence) if adapter == "cs-lora2" else "wrong"
            transcripts.append(Transcript(adapter, "cs", i, text, "end"))
    (part,) = summarise(run, {"cs": split}, bank, transcripts=transcripts).languages
    pairs = [(difference.first, difference.second) for difference in part.differences]
    assert pairs[:4] == [(f"lora{i}", "base") for i in range(4)]
    assert pairs[4:] == [("lora0", "lora2"), ("lora1", "lora2"), ("lora2", "lora3")]


def test_utterances_are_aligned_and_few_clips_are_embedded(summary: SpeechResults) -> None:
    (part,) = summary.languages
    kinds = [utterance.kind for utterance in part.utterances]
    assert kinds == ["worst"] * 6
    first = part.utterances[0]
    assert first.adapter[0].kind == "substitute"
    assert [utterance.audio is not None for utterance in part.utterances] == [True] + [False] * 5
    assert first.audio is not None
    assert first.audio.startswith("data:audio/ogg;base64,")


def test_the_page_is_well_formed_and_states_which_method_is_better(
    summary: SpeechResults, capsys: pytest.CaptureFixture[str]
) -> None:
    page = page_of(results_of({"cs": {"flora": -0.2, "lora": -0.1}}, speech=summary))
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references <= set(outline.ids)
    assert "<audio controls" in page
    assert "Error rate is significantly lower than the base: flora in cs; lora in cs (of 1 language)." in page
    print_error_rates(summary)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 82
    assert "difference to base" in said


def test_no_clip_is_embedded_with_embedded_clips_0(summary: SpeechResults, tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs")
    split = load(files, tmp_path).test
    assert isinstance(split, SpeechSplit)
    run = config(files, embedded_clips=0)
    bank = AdapterBank.attach(loaded_tiny_whisper(), expand(run))
    transcripts = [Transcript(adapter, "cs", i, "no", "end") for adapter in ROUNDS for i in range(len(split))]
    (part,) = summarise(run, {"cs": split}, bank, transcripts=transcripts).languages
    assert part.utterances
    assert all(utterance.audio is None for utterance in part.utterances)


@pytest.mark.parametrize(
    ("reference", "direction"),
    [
        ("هذا السؤال أسهل.", "rtl"),
        ("12. «שלום» world", "rtl"),
        ("यह सवाल", "ltr"),
        ("GPU هذا", "ltr"),
        ("12.", "ltr"),
    ],
)
def test_utterances_are_shown_in_the_direction_of_their_first_letter(
    summary: SpeechResults, reference: str, direction: str
) -> None:
    (part,) = summary.languages
    utterance = part.utterances[0].replace(reference=reference)
    assert utterance.direction == direction
    shown = summary.replace(languages=(part.replace(language="ar", utterances=(utterance,)),))
    page = page_of(results_of({"cs": {"flora": -0.2, "lora": -0.1}}, speech=shown))
    assert f'<dt>reference</dt><dd lang="ar" dir="{direction}">{reference}</dd>' in page
    assert '<del dir="auto">' in page


def test_no_method_that_is_better_than_the_base_is_one_sentence(summary: SpeechResults) -> None:
    (part,) = summary.languages
    worse = tuple(
        difference.replace(wer_normalized=difference.wer_normalized.replace(value=0.1, low=0.05, high=0.2))
        for difference in part.differences
    )
    shown = summary.replace(languages=(part.replace(differences=worse),))
    page = page_of(results_of({"cs": {"flora": -0.2, "lora": -0.1}}, speech=shown))
    assert "No method has a significantly lower error rate than the base in any language." in page


def test_error_rates_of_seeds_have_a_mean_and_a_deviation(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs", held=6)
    split = load(files, tmp_path).test
    assert isinstance(split, SpeechSplit)
    raw = config(files, embedded_clips=0).model_dump(mode="json")
    raw["adapters"] = {
        "lora": {"method": "lora", "lr": 1e-3, "seed": [0, 1]},
        "flora": {"method": "flora", "lr": 1e-3},
    }
    run = validate(raw)
    bank = AdapterBank.attach(loaded_tiny_whisper(), expand(run))
    wrong = {"__base__": 3, "cs-lora_seed0": 2, "cs-lora_seed1": 0, "cs-flora": 1}
    transcripts = []
    for adapter, n in wrong.items():
        for i, sentence in enumerate(split.sentences):
            words = str(sentence).split()
            transcripts.append(Transcript(adapter, "cs", i, " ".join(["wrong"] * n + words[n:]), "end"))
    (part,) = summarise(run, {"cs": split}, bank, transcripts=transcripts).languages
    (mean,) = part.over_seeds
    rates = [part.by_family[f"lora_seed{seed}"].wer_normalized for seed in (0, 1)]
    values = [rate.value or 0.0 for rate in rates]
    assert mean.name == "cs-lora"
    assert mean.wer_normalized.value == pytest.approx(sum(values) / 2)
    assert mean.wer_normalized.deviation == pytest.approx(stdev(values))
    assert mean.wer_normalized.substitutions == sum(rate.substitutions for rate in rates)
    assert mean.wer_normalized.units == 2 * rates[0].units
    assert mean.ended == {"end": 12}
    pairs = {(difference.first, difference.second) for difference in part.differences}
    assert pairs - {("lora", "flora"), ("flora", "lora")} == {
        ("lora_seed0", "base"),
        ("lora_seed1", "base"),
        ("flora", "base"),
        ("lora", "base"),
    }
    assert len(pairs) == 5
