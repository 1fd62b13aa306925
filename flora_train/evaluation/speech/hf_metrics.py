"""Error rates as metrics of the Hugging Face evaluate library, usable offline and with several processes.

    from flora_train.evaluation.speech.hf_metrics import WordErrorRate
    WordErrorRate(normalizer="letters").compute(predictions=["hello word"], references=["Hello, world!"])
    {'wer': 0.5, 'S': 1, 'D': 0, 'I': 0, 'N': 2, 'n': 1, 'normalizer': 'letters-1'}

No other module imports this one, as training and reports do not need the evaluate package.
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
    """normalizer: a name of NORMALIZERS, or "none" for unchanged texts. language: its rules of case apply."""

    errors: Callable[[Sequence[str], Sequence[str]], Errors]

    def __init__(self, normalizer: str = "none", language: str = "", **options: Any) -> None:
        names = (*NORMALIZERS, "none")
        if normalizer not in names:
            raise user_error("normalizer", normalizer, f"must be one of {choices(names)}")
        self.normalizer, self.language = normalizer, language
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="Morris, Maier & Green, From WER and RIL to MER and WIL, Interspeech 2004",
            inputs_description="predictions, references: lists of transcripts, one for each utterance",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        normalize: Callable[[str], str] = str
        name = "none"
        if self.normalizer != "none":
            normalize = normalizer_of(self.normalizer, self.language)
            name = label(self.normalizer, self.language)
        errors = type(self).errors(
            [normalize(text) for text in references], [normalize(text) for text in predictions]
        )
        return {self.name: errors.rate, **errors.record(), "normalizer": name}


class WordErrorRate(_ErrorRate):
    """Word error rate of a corpus: (S + D + I) / N, summed over its utterances."""

    name = "wer"
    errors = staticmethod(word_errors)


class CharacterErrorRate(_ErrorRate):
    """Character error rate of a corpus: (S + D + I) / N over all utterances; spaces are characters."""

    name = "cer"
    errors = staticmethod(character_errors)
