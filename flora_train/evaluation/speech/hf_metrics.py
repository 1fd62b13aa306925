"""Error rates as metrics of the evaluate library: offline, and under several processes, as any of its metrics.

    from flora_train.evaluation.speech.hf_metrics import WordErrorRate
    WordErrorRate(normalizer="letters").compute(predictions=["hello word"], references=["Hello, world!"])
    {'wer': 0.5, 'S': 1, 'D': 0, 'I': 0, 'N': 2, 'n': 1, 'normalizer': 'letters-1'}

It is no import of anything else here: training and reports do not need the evaluate package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from flora_train.config.errors import choices, user_error
from flora_train.evaluation.speech.error_rates import Errors, character_errors, word_errors
from flora_train.evaluation.speech.normalize import NORMALIZERS, label, normalizer_of


class _ErrorRate(evaluate.Metric):
    """normalizer: a name of NORMALIZERS, or "none": what is written counts as it is; language: whose rules of case it follows."""

    errors: Callable[[Sequence[str], Sequence[str]], Errors]

    def __init__(self, normalizer: str = "none", language: str = "", **options: Any) -> None:
        if normalizer not in (known := (*NORMALIZERS, "none")):
            raise user_error("normalizer", normalizer, f"there are {choices(known)}")
        self.normalizer, self.language = normalizer, language
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="Morris, Maier & Green, From WER and RIL to MER and WIL, Interspeech 2004",
            inputs_description="predictions, references: lists of transcripts, one an utterance",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        normalize = str if self.normalizer == "none" else normalizer_of(self.normalizer, self.language)
        found = type(self).errors([normalize(text) for text in references], [normalize(text) for text in predictions])
        name = self.normalizer if self.normalizer == "none" else label(self.normalizer, self.language)
        return {self.name: found.rate, **found.record(), "normalizer": name}


class WordErrorRate(_ErrorRate):
    """Word error rate of a corpus: (S + D + I) / N, summed over its utterances."""

    name = "wer"
    errors = staticmethod(word_errors)


class CharacterErrorRate(_ErrorRate):
    """Character error rate of a corpus: (S + D + I) / N, summed over its utterances; spaces are characters."""

    name = "cer"
    errors = staticmethod(character_errors)
