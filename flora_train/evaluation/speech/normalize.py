"""What in a transcript counts? One normaliser per family of languages; all keep the marks that vowels are written with.

Whisper's BasicTextNormalizer takes every mark away, also Hindi's and Thai's vowel signs, which makes other words of them; here
marks stay. VERSION changes with every change of what a normaliser does, and stands beside every error rate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from flora_train.config.speech_schema import SpeechConfig

VERSION = 1
ARABIC = ("ar", "fa", "ur", "ps", "ckb", "ug", "sd", "ku")
UNSPACED = ("zh", "ja", "th", "lo", "my", "km", "yue", "bo")
"""Languages written without spaces between words."""
TURKIC, LITHUANIAN = ("tr", "tur", "az", "aze", "crh", "gag"), ("lt", "lit")
"""Languages with small letters of their own: of I and İ; i and j that keep their dot below an accent. All others are folded alike, the
Greek final sigma and the German sharp s among them."""
DOTS = str.maketrans({"I": "ı", "İ": "i"})
KEPT_DOT = re.compile("(?<=[iIjJ])(̨?)̇")
APOSTROPHES = str.maketrans(dict.fromkeys("‘’ʼ＇`´", "'"))
SHORT_VOWELS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")
"""Arabic signs that are written or left out at will (harakat, superscript alef, Quranic marks), and tatweel."""


def letters(text: str) -> str:
    """Case, punctuation, symbols and the width of letters do not count; letters, digits and all marks do. An apostrophe inside a
    word stays (l'eau, don't), whichever sign it is written with."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = unicodedata.normalize("NFC", folded).translate(APOSTROPHES)
    kept = "".join(c if _counts(folded, i) else " " for i, c in enumerate(folded))
    return " ".join(kept.split())


def arabic(text: str) -> str:
    """`letters`, without short vowels and tatweel."""
    return letters(SHORT_VOWELS.sub("", unicodedata.normalize("NFKC", text)))


def unspaced(text: str) -> str:
    """`letters`, without spaces: for error rates by character."""
    return letters(text).replace(" ", "")


NORMALIZERS: dict[str, Callable[[str], str]] = {"letters": letters, "arabic": arabic, "unspaced": unspaced}


def normalizer_of(name: str, language: str = "") -> Callable[[str], str]:
    """The normaliser of that name, by the language's own rules of case."""
    normalize, code = NORMALIZERS[name], _code(language)
    if code in TURKIC:
        return lambda text: normalize(unicodedata.normalize("NFKC", text).translate(DOTS))
    if code in LITHUANIAN:
        return lambda text: normalize(KEPT_DOT.sub(r"\1", unicodedata.normalize("NFD", text)))
    return normalize


def label(name: str, language: str = "") -> str:
    """What stands beside an error rate: the normaliser, the version of its rules, and the language where it has rules of its own."""
    code = _code(language)
    return f"{name}-{VERSION}" + (f"-{code}" if code in (*TURKIC, *LITHUANIAN) else "")


def _code(language: str) -> str:
    return language.lower().partition("-")[0].partition("_")[0]


def normalizer_name(speech: SpeechConfig) -> str:
    """The normaliser of a task, by name: what it asks for, or its language's."""
    if speech.normalizer != "auto":
        return speech.normalizer
    language = _code(speech.language)
    return "arabic" if language in ARABIC else "unspaced" if language in UNSPACED else "letters"


def primary_metric(speech: SpeechConfig) -> str:
    """wer or cer: the rate that comes first."""
    if speech.metric != "auto":
        return speech.metric
    return "cer" if normalizer_name(speech) == "unspaced" else "wer"


def _counts(text: str, i: int) -> bool:
    """Whether a character stays: letter, digit, mark, joiner between them, or an apostrophe between letters."""
    category = unicodedata.category(text[i])[0]
    if category in "LNM" or text[i] in "\u200c\u200d":
        return True
    return text[i] == "'" and 0 < i < len(text) - 1 and text[i - 1].isalpha() and text[i + 1].isalpha()
