"""Normalisers of transcripts, one for each family of languages.

All of them keep marks. Whisper's BasicTextNormalizer removes them, including the vowel signs of Hindi and
Thai, and thereby changes words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from flora_train.config.speech_schema import SpeechConfig

VERSION = 1
"""Increased with every change of a normaliser's rules; stated beside every error rate."""
ARABIC = ("ar", "fa", "ur", "ps", "ckb", "ug", "sd", "ku")
UNSPACED = ("zh", "ja", "th", "lo", "my", "km", "yue", "bo")
"""Languages written without spaces between words."""
TURKIC = ("tr", "tur", "az", "aze", "crh", "gag")
"""Languages with their own lower case of I and İ."""
LITHUANIAN = ("lt", "lit")
"""The language in which i and j keep their dot below an accent.

All other languages share one case folding, which includes the Greek final sigma and the German sharp s.
"""
DOTS = str.maketrans({"I": "ı", "İ": "i"})
KEPT_DOT = re.compile("(?<=[iIjJ])(̨?)̇")
APOSTROPHES = str.maketrans(dict.fromkeys("‘’ʼ＇`´", "'"))
SHORT_VOWELS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")
"""Optional Arabic signs (harakat, superscript alef, Quranic marks), and tatweel."""


def letters(text: str) -> str:
    """Keep letters, digits and marks; ignore case, punctuation, symbols and the width of letters.

    An apostrophe inside a word is kept (l'eau, don't), whichever character it is written with.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = unicodedata.normalize("NFC", folded).translate(APOSTROPHES)
    characters = list(folded)
    for i in range(len(folded)):
        if not _counts(folded, i):
            characters[i] = " "
    return " ".join("".join(characters).split())


def arabic(text: str) -> str:
    """`letters`, without short vowels and tatweel."""
    return letters(SHORT_VOWELS.sub("", unicodedata.normalize("NFKC", text)))


def unspaced(text: str) -> str:
    """`letters`, without spaces: for error rates by character."""
    return letters(text).replace(" ", "")


NORMALIZERS: dict[str, Callable[[str], str]] = {"letters": letters, "arabic": arabic, "unspaced": unspaced}


def normalizer_of(name: str, language: str = "") -> Callable[[str], str]:
    """The normaliser of that name, with the language's own rules of case."""
    normalize, code = NORMALIZERS[name], _code(language)
    if code in TURKIC:
        return lambda text: normalize(unicodedata.normalize("NFKC", text).translate(DOTS))
    if code in LITHUANIAN:
        return lambda text: normalize(KEPT_DOT.sub(r"\1", unicodedata.normalize("NFD", text)))
    return normalize


def label(name: str, language: str = "") -> str:
    """The label of a normaliser in results: name, version, and the language if it has its own rules."""
    code = _code(language)
    if code in (*TURKIC, *LITHUANIAN):
        return f"{name}-{VERSION}-{code}"
    return f"{name}-{VERSION}"


def _code(language: str) -> str:
    return language.lower().partition("-")[0].partition("_")[0]


def normalizer_name(speech: SpeechConfig) -> str:
    """The name of a task's normaliser: the configured one, or that of its language."""
    if speech.normalizer != "auto":
        return speech.normalizer
    language = _code(speech.language)
    if language in ARABIC:
        return "arabic"
    return "unspaced" if language in UNSPACED else "letters"


def primary_metric(speech: SpeechConfig) -> str:
    """wer or cer: the rate that is reported first."""
    if speech.metric != "auto":
        return speech.metric
    return "cer" if normalizer_name(speech) == "unspaced" else "wer"


def _counts(text: str, i: int) -> bool:
    """Whether a character is kept: a letter, digit, mark, joiner, or an apostrophe between letters."""
    category = unicodedata.category(text[i])[0]
    if category in "LNM" or text[i] in "\u200c\u200d":
        return True
    return text[i] == "'" and 0 < i < len(text) - 1 and text[i - 1].isalpha() and text[i + 1].isalpha()
