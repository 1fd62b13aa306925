"""The error rates of a speech run: speech/error_rates.json, and a part of report.json."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, BASE_ID
from flora_train.config.schema import RunConfig
from flora_train.data.audio.decode import RATE, ClipError, read_clip
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.splits import seed_of
from flora_train.evaluation.bootstrap import Comparison, Estimate, compare_ratios, compared_pairs, finite
from flora_train.evaluation.result_model import read_results
from flora_train.evaluation.seeds import SeedGroup, compared_ids, deviation, group_ids, seed_groups
from flora_train.evaluation.speech.error_rates import Errors, aligned, character_errors, word_errors
from flora_train.evaluation.speech.normalize import label, normalizer_name, normalizer_of, primary_metric
from flora_train.evaluation.speech.score_types import (
    ErrorRate,
    Rate,
    RateDifference,
    SpeechLanguage,
    SpeechResults,
    TranscriptionScore,
    Utterance,
)
from flora_train.runtime.atomic import write_atomically

SCORES = "error_rates.json"
RATES: tuple[Rate, ...] = ("wer", "wer_normalized", "cer")
MAX_UTTERANCES = 12
"""Utterances that a report aligns, over all languages."""


@dataclass(frozen=True)
class Transcript:
    """A contender's transcript of a test clip."""

    adapter: str
    """Its name; "__base__" for the base model."""
    task: str
    example: int
    text: str
    ended: str


@dataclass(frozen=True)
class TaskTranscripts:
    """All transcripts of one task's test clips. Contenders are ids, BASE_ID first."""

    split: SpeechSplit
    families: Mapping[int, str]
    """Contender -> family."""
    references: Sequence[str]
    texts: Mapping[int, Sequence[str]]
    """Contender -> transcript of each clip."""


def read_summary(folder: Path) -> SpeechResults | None:
    """The error rates in a run's evaluation folder; None if there are none. Raises UserError if they are
    damaged."""
    file = folder / "speech" / SCORES
    if not file.exists():
        return None
    return read_results(file, SpeechResults, "delete it, and flora-train evaluate writes it again")


def write_summary(summary: SpeechResults, folder: Path) -> None:
    """Write `folder`/error_rates.json atomically."""
    text = json.dumps(summary.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / SCORES, lambda path: path.write_text(text, encoding="utf-8"))


def summarise(
    config: RunConfig,
    splits: Mapping[str, SpeechSplit],
    bank: AdapterBank,
    *,
    transcripts: Sequence[Transcript],
) -> SpeechResults:
    """Error rates with intervals, paired differences and some aligned utterances of each task."""
    by_contender: dict[tuple[str, str], dict[int, Transcript]] = defaultdict(dict)
    for transcript in transcripts:
        by_contender[transcript.task, transcript.adapter][transcript.example] = transcript
    utterances = max(1, MAX_UTTERANCES // (2 * len(splits)))
    parts = [
        _language(config, name, split, bank=bank, transcripts=by_contender, max_utterances=utterances)
        for name, split in splits.items()
    ]
    languages = _with_audio(
        [part for part, _ in parts], [clips for _, clips in parts], config.evaluation.embedded_clips
    )
    return SpeechResults(
        beams=config.evaluation.beams,
        max_new_tokens=config.evaluation.max_new_tokens,
        window_step=config.audio.window_step,
        confidence=config.evaluation.confidence,
        languages=languages,
    )


def _with_audio(
    languages: Sequence[SpeechLanguage], clips: Sequence[Sequence[str]], limit: int
) -> list[SpeechLanguage]:
    """Embed the clips of the first `limit` utterances, taken from the languages in turn. clips: paths, by
    utterance."""
    positions = [zip(repeat(i), range(len(paths))) for i, paths in enumerate(clips)]
    in_turn = [position for position in chain.from_iterable(zip_longest(*positions)) if position is not None]
    audio = {(i, j): _data_url(clips[i][j]) for i, j in in_turn[:limit]}
    embedded = []
    for i, part in enumerate(languages):
        utterances = [
            utterance.replace(audio=audio.get((i, j))) for j, utterance in enumerate(part.utterances)
        ]
        embedded.append(part.replace(utterances=utterances))
    return embedded


def _language(
    config: RunConfig,
    name: str,
    split: SpeechSplit,
    *,
    bank: AdapterBank,
    transcripts: Mapping[tuple[str, str], Mapping[int, Transcript]],
    max_utterances: int,
) -> tuple[SpeechLanguage, list[str]]:
    """The results of one task, and the paths of the clips of its utterances."""
    speech = config.tasks[name].speech
    assert speech is not None
    specs = {i: spec for i, spec in enumerate(bank.specs) if spec.task == name}
    names = {BASE_ID: BASE} | {i: spec.name for i, spec in specs.items()}
    families = {BASE_ID: "base"} | {i: spec.family for i, spec in specs.items()}
    of_contender = {i: transcripts[name, contender] for i, contender in names.items()}
    texts = {}
    for i, of_clip in of_contender.items():
        texts[i] = [of_clip[clip].text for clip in range(len(split))]
    task = TaskTranscripts(split, families, [str(sentence) for sentence in split.sentences], texts)
    normalizer = normalizer_name(speech)
    groups = group_ids(seed_groups(bank.specs, name), specs)
    families |= {i: group.family for i, group in groups.items()}
    errors = {
        rate: _errors_of_all(rate, normalizer, speech.language, task=task, groups=groups) for rate in RATES
    }
    seed = seed_of(config.seed, name, "error rates")
    compared = {rate: _compare(config, errors[rate], seed, groups=groups) for rate in RATES}
    contenders = []
    ended = {i: Counter(transcript.ended for transcript in of_contender[i].values()) for i in names}
    for i, contender in names.items():
        rates = {rate: _error_rate(compared[rate].contenders[i], errors[rate][i]) for rate in RATES}
        contender_name = "base" if i == BASE_ID else contender
        contenders.append(
            TranscriptionScore(name=contender_name, family=families[i], **rates, ended=dict(ended[i]))
        )
    means = []
    for i, group in groups.items():
        rates = {rate: _mean_rate(i, group, compared[rate], errors[rate][i]) for rate in RATES}
        counts = sum((ended[member] for member in group.members), Counter())
        means.append(TranscriptionScore(name=group.name, family=group.family, **rates, ended=dict(counts)))
    differences = []
    metric: Rate = "cer" if primary_metric(speech) == "cer" else "wer_normalized"
    for a, b in _pairs(compared[metric], groups):
        by_rate = {rate: compared[rate].differences[a, b].interval() for rate in RATES}
        differences.append(RateDifference(first=families[a], second=families[b], **by_rate))
    normalize = normalizer_of(_of_words(normalizer), speech.language)
    utterances, clips = _utterances(normalize, task, errors["wer_normalized"], limit=max_utterances)
    metric = "wer_normalized"
    if primary_metric(speech) == "cer":
        metric = "cer"
    part = SpeechLanguage(
        task=name,
        language=speech.language,
        token=speech.token or f"<|{speech.language}|>",
        normalizer=label(normalizer, speech.language),
        metric=metric,
        clips=len(split),
        seconds=float(split.seconds.sum()),
        contenders=contenders,
        over_seeds=means,
        differences=differences,
        utterances=utterances,
    )
    return part, clips


def _mean_rate(i: int, group: SeedGroup, compared: Comparison, errors: Errors) -> ErrorRate:
    """The mean over seeds, with their deviation. errors: their sums."""
    rate = _error_rate(compared.contenders[i], errors)
    values = [finite(compared.contenders[member].value) for member in group.members]
    return rate.replace(deviation=deviation(values))


def _compare(
    config: RunConfig, errors: Mapping[int, Errors], seed: int, *, groups: Mapping[int, SeedGroup]
) -> Comparison:
    """Error rates of contenders, and mean rates of groups, of which `errors` has the sums."""
    options = config.evaluation
    totals: dict[int, NDArray[Any]] = {i: counts.total for i, counts in errors.items()}
    for i, group in groups.items():
        totals[i] = totals[i] / len(group.members)
    return compare_ratios(
        totals,
        errors[BASE_ID].units,
        samples=options.bootstrap_samples,
        confidence=options.confidence,
        seed=seed,
    )


def _error_rate(estimate: Estimate, errors: Errors) -> ErrorRate:
    interval = estimate.interval()
    return ErrorRate(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        excludes_zero=interval.excludes_zero,
        substitutions=int(errors.substitutions.sum()),
        deletions=int(errors.deletions.sum()),
        insertions=int(errors.insertions.sum()),
        units=int(errors.units.sum()),
        clips=len(errors.units),
    )


def _errors_of_all(
    rate: Rate, normalizer: str, language: str, *, task: TaskTranscripts, groups: Mapping[int, SeedGroup]
) -> dict[int, Errors]:
    """Contender -> its errors; group -> the sums over its seeds."""
    errors = {
        i: _errors(rate, normalizer, language, references=task.references, transcripts=texts)
        for i, texts in task.texts.items()
    }
    sums = {}
    for i, group in groups.items():
        seeds = [errors[member] for member in group.members]
        sums[i] = Errors(
            substitutions=np.sum([counts.substitutions for counts in seeds], axis=0),
            deletions=np.sum([counts.deletions for counts in seeds], axis=0),
            insertions=np.sum([counts.insertions for counts in seeds], axis=0),
            units=np.sum([counts.units for counts in seeds], axis=0),
        )
    return errors | sums


def _errors(
    rate: Rate, normalizer: str, language: str, *, references: Sequence[str], transcripts: Sequence[str]
) -> Errors:
    if rate == "wer":
        return word_errors(references, transcripts)
    if rate == "wer_normalized":
        normalize, count = normalizer_of(_of_words(normalizer), language), word_errors
    else:
        normalize, count = normalizer_of(normalizer, language), character_errors
    return count([normalize(text) for text in references], [normalize(text) for text in transcripts])


def _of_words(normalizer: str) -> str:
    """The normaliser for word error rates: text without spaces has no words."""
    return "letters" if normalizer == "unspaced" else normalizer


def _pairs(comparison: Comparison, groups: Mapping[int, SeedGroup]) -> list[tuple[int, int]]:
    """Each adapter with the base, then each pair of adapters, or means over seeds in the place of their
    adapters; of many, each with the best."""
    rates = {i: estimate.value for i, estimate in comparison.contenders.items() if i != BASE_ID}
    compared = compared_ids((i for i in rates if i not in groups), groups)
    finite_rates = {i: rates[i] for i in compared if math.isfinite(rates[i])}
    best = min(finite_rates, key=lambda i: finite_rates[i], default=None)
    return [*((i, BASE_ID) for i in rates), *compared_pairs(compared, best)]


def _utterances(
    normalize: Callable[[str], str], task: TaskTranscripts, errors: Mapping[int, Errors], *, limit: int
) -> tuple[list[Utterance], list[str]]:
    """Aligned utterances and the paths of their clips.

    These are the clips on which the first adapter made most errors, and those on which it improved most over
    the base: at most `limit` of each.
    """
    first = next((i for i in task.families if i != BASE_ID), BASE_ID)
    of_first, of_base = errors[first].total, errors[BASE_ID].total
    clips = range(len(task.references))
    worst = sorted(clips, key=lambda clip: (-of_first[clip], clip))[:limit]
    by_gain = sorted(clips, key=lambda clip: (of_first[clip] - of_base[clip], clip))
    improved = [clip for clip in by_gain if of_base[clip] > of_first[clip] and clip not in worst]
    chosen: list[tuple[Literal["worst", "most improved"], int]] = [
        ("worst", clip) for clip in worst if of_first[clip]
    ]
    chosen += [("most improved", clip) for clip in improved[:limit]]
    utterances = []
    for kind, clip in chosen:
        reference = normalize(task.references[clip])
        utterances.append(
            Utterance(
                kind=kind,
                family=task.families[first],
                file=Path(str(task.split.paths[clip])).name,
                seconds=float(task.split.seconds[clip]),
                reference=task.references[clip],
                base=aligned(reference, normalize(task.texts[BASE_ID][clip])),
                adapter=aligned(reference, normalize(task.texts[first][clip])),
                audio=None,
            )
        )
    return utterances, [str(task.split.paths[clip]) for _, clip in chosen]


def _data_url(path: str) -> str | None:
    """The clip as a data URL of ogg audio; None if it cannot be decoded."""
    import soundfile

    try:
        samples = read_clip(Path(path))
    except ClipError:
        return None
    out = io.BytesIO()
    soundfile.write(out, samples, RATE, format="OGG", subtype="VORBIS")
    return f"data:audio/ogg;base64,{base64.b64encode(out.getvalue()).decode()}"
