"""What does a reader get to see of a speech run? One plain mapping (speech/error_rates.json, and a part of report.json)."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, BASE_ID
from flora_train.config.json_format import read_object
from flora_train.config.schema import RunConfig
from flora_train.data.audio.decode import RATE, ClipError, read_clip
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.splits import seed_of
from flora_train.evaluation.bootstrap import compare_ratios
from flora_train.evaluation.speech.error_rates import Errors, aligned, character_errors, word_errors
from flora_train.evaluation.speech.normalize import label, normalizer_name, normalizer_of, primary_metric
from flora_train.runtime.atomic import write_atomically

SCORES = "error_rates.json"
RATES = ("wer", "wer_normalized", "cer")
"""Word error rate of what is written, of what is normalised, and character error rate of what is normalised."""
SHOWN = 12
"""Utterances that a report aligns, over all languages."""


@dataclass(frozen=True)
class Heard:
    """What a contender ("__base__": the base) wrote for a test clip."""

    adapter: str
    task: str
    example: int
    text: str
    ended: str


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What an evaluation left in a run's evaluation folder."""
    file = folder / "speech" / SCORES
    return read_object(file, "delete it, and flora-train evaluate makes it again") if file.exists() else None


def write_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """As `folder`/error_rates.json, whole or not at all."""
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder / SCORES, lambda path: path.write_text(text, encoding="utf-8"))


def summarise(config: RunConfig, splits: Mapping[str, SpeechSplit], bank: AdapterBank, heard: Sequence[Heard]) -> dict[str, Any]:
    """languages: per task every contender's rates with intervals, counts and what went wrong, all paired differences, and some
    utterances aligned; settings beside them."""
    texts: dict[tuple[str, str], dict[int, Heard]] = defaultdict(dict)
    for one in heard:
        texts[one.task, one.adapter][one.example] = one
    shown = max(1, SHOWN // (2 * len(splits)))
    return {
        "beams": config.evaluation.beams,
        "max_new_tokens": config.evaluation.max_new_tokens,
        "window_step": config.audio.window_step,
        "confidence": config.evaluation.confidence,
        "languages": _with_audio(
            [_language(config, name, split, bank, texts, shown) for name, split in splits.items()],
            config.evaluation.embedded_clips,
        ),
    }


def _with_audio(languages: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Let the first so many utterances be played, language by language in turn."""
    shown = [part["utterances"] for part in languages]
    in_turn = [utterance for together in zip_longest(*shown) for utterance in together if utterance is not None]
    for i, utterance in enumerate(in_turn):
        utterance["audio"] = _playable(utterance.pop("path")) if i < most else None
        utterance.pop("path", None)
    return languages


def _language(
    config: RunConfig,
    name: str,
    split: SpeechSplit,
    bank: AdapterBank,
    texts: Mapping[tuple[str, str], Mapping[int, Heard]],
    shown: int,
) -> dict[str, Any]:
    speech = config.tasks[name].speech
    assert speech is not None
    said = [str(sentence) for sentence in split.sentences]
    ids = [BASE_ID, *(i for i, spec in enumerate(bank.specs) if spec.task == name)]
    heard = {i: texts[name, BASE if i == BASE_ID else bank.specs[i].name] for i in ids}
    wrote = {i: [heard[i][example].text for example in range(len(said))] for i in ids}
    normalizer = normalizer_name(speech)
    errors = {rate: {i: _errors(rate, normalizer, speech.language, said, wrote[i]) for i in ids} for rate in RATES}
    options = config.evaluation
    seed = seed_of(config.seed, name, "error rates")
    compared = {
        rate: compare_ratios(
            {i: found.total for i, found in of.items()}, of[BASE_ID].units, options.bootstrap_samples, options.confidence, seed
        )
        for rate, of in errors.items()
    }
    families = {i: "base" if i == BASE_ID else bank.specs[i].family for i in ids}
    return {
        "task": name,
        "language": speech.language,
        "token": speech.token or f"<|{speech.language}|>",
        "normalizer": label(normalizer, speech.language),
        "metric": "cer" if primary_metric(speech) == "cer" else "wer_normalized",
        "clips": len(split),
        "seconds": float(split.seconds.sum()),
        "contenders": [
            {
                "name": "base" if i == BASE_ID else bank.specs[i].name,
                "family": families[i],
                **{rate: {**compared[rate].contenders[i].record(), **errors[rate][i].record()} for rate in RATES},
                "ended": dict(Counter(one.ended for one in heard[i].values())),
            }
            for i in ids
        ],
        "differences": [
            {"a": families[a], "b": families[b], **{rate: compared[rate].differences[a, b].record() for rate in RATES}}
            for a, b in _pairs(ids)
        ],
        "utterances": _utterances(
            normalizer_of(_of_words(normalizer), speech.language), split, said, wrote, errors["wer_normalized"], families, shown
        ),
    }


def _errors(rate: str, normalizer: str, language: str, said: Sequence[str], wrote: Sequence[str]) -> Errors:
    if rate == "wer":
        return word_errors(said, wrote)
    normalize = normalizer_of(_of_words(normalizer) if rate == "wer_normalized" else normalizer, language)
    count = character_errors if rate == "cer" else word_errors
    return count([normalize(text) for text in said], [normalize(text) for text in wrote])


def _of_words(normalizer: str) -> str:
    """Without spaces there are no words."""
    return "letters" if normalizer == "unspaced" else normalizer


def _pairs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Everybody against the base, and each against those after it."""
    others = [i for i in ids if i != BASE_ID]
    return [(a, BASE_ID) for a in others] + [(a, b) for place, a in enumerate(others) for b in others[place + 1 :]]


def _utterances(
    normalize: Callable[[str], str],
    split: SpeechSplit,
    said: Sequence[str],
    wrote: Mapping[int, Sequence[str]],
    errors: Mapping[int, Errors],
    families: Mapping[int, str],
    shown: int,
) -> list[dict[str, Any]]:
    """The clips that the first family got most wrong, and those where it won most words over the base; each aligned."""
    first = next((i for i in families if i != BASE_ID), BASE_ID)
    mine, base = errors[first].total, errors[BASE_ID].total
    worst = sorted(range(len(said)), key=lambda e: (-mine[e], e))[:shown]
    won = [e for e in sorted(range(len(said)), key=lambda e: (mine[e] - base[e], e)) if base[e] > mine[e] and e not in worst]
    chosen = [("worst", e) for e in worst if mine[e]] + [("most improved", e) for e in won[:shown]]
    return [
        {
            "kind": kind,
            "family": families[first],
            "file": Path(str(split.paths[e])).name,
            "seconds": float(split.seconds[e]),
            "said": said[e],
            "base": aligned(normalize(said[e]), normalize(wrote[BASE_ID][e])),
            "adapter": aligned(normalize(said[e]), normalize(wrote[first][e])),
            "path": str(split.paths[e]),
        }
        for kind, e in chosen
    ]


def _playable(path: str) -> str | None:
    """A clip as ogg in a data URL, which a page can hold."""
    import soundfile

    try:
        samples = read_clip(Path(path))
    except ClipError:
        return None
    out = io.BytesIO()
    soundfile.write(out, samples, RATE, format="OGG", subtype="VORBIS")
    return f"data:audio/ogg;base64,{base64.b64encode(out.getvalue()).decode()}"
