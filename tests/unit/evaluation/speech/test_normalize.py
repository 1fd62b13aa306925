"""Normalisers keep vowel marks in every script, and remove what does not count in speech."""

from __future__ import annotations

import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from flora_train.config.speech_schema import SpeechConfig
from flora_train.evaluation.speech.normalize import (
    NORMALIZERS,
    arabic,
    label,
    letters,
    normalizer_name,
    normalizer_of,
    primary_metric,
    unspaced,
)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Příliš, ŽLUŤOUČKÝ kůň!", "příliš žluťoučký kůň"),
        ("«L’eau est-elle froide ?»", "l'eau est elle froide"),
        ("Don't -- 'quote' me.", "don't quote me"),
        ("मैं हिन्दी में बोलता हूँ।", "मैं हिन्दी में बोलता हूँ"),
        ("मी मराठीत बोलतो.", "मी मराठीत बोलतो"),
        ("สวัสดีครับ น้ำ", "สวัสดีครับ น้ํา"),  # SARA AM is two signs in compatibility form
        ("Сайн байна уу?", "сайн байна уу"),
        ("ΠΏΣ ΕΊΣΑΙ;", "πώσ είσαι"),
        ("ＡＢＣ１２３", "abc123"),
        ("5 € + 3%", "5 3"),
    ],
)
def test_letters_keeps_letters_digits_and_marks(text: str, same: str) -> None:
    assert letters(text) == same
    assert letters(letters(text)) == letters(text)


@pytest.mark.parametrize("word", ["हिन्दी", "मराठी", "ที่นี่", "မြန်မာ", "தமிழ்"])
def test_letters_keeps_vowel_signs_that_whispers_normaliser_removes(word: str) -> None:
    assert letters(word) == word
    assert BasicTextNormalizer()(word).replace(" ", "") != word


def test_composed_and_decomposed_letters_are_the_same() -> None:
    assert letters("e\u0301te\u0301") == letters("\u00e9t\u00e9") == "\u00e9t\u00e9"


def test_arabic_is_the_same_with_and_without_short_vowels() -> None:
    assert arabic("السَّلَامُ عَلَيْكُمْ") == arabic("السلام عليكم") == "السلام عليكم"
    assert arabic("مـــرحبا") == "مرحبا"


def test_languages_without_spaces_use_character_error_rates() -> None:
    assert unspaced("今日は、 いい 天気。") == "今日はいい天気"
    choice = {
        language: (normalizer_name(s), primary_metric(s))
        for language in ("cs", "ar", "th", "ja", "zh", "zh-CN", "hi")
        for s in [SpeechConfig(language=language)]
    }
    assert choice == {
        "cs": ("letters", "wer"),
        "ar": ("arabic", "wer"),
        "th": ("unspaced", "cer"),
        "ja": ("unspaced", "cer"),
        "zh": ("unspaced", "cer"),
        "zh-CN": ("unspaced", "cer"),
        "hi": ("letters", "wer"),
    }
    assert primary_metric(SpeechConfig(language="th", metric="wer")) == "wer"
    assert normalizer_name(SpeechConfig(language="th", normalizer="letters")) == "letters"
    assert set(NORMALIZERS) == {"letters", "arabic", "unspaced"}


@pytest.mark.parametrize(
    ("language", "text", "same"),
    [
        ("tr", "IŞIK, İstanbul'da!", "ışık istanbul'da"),
        ("tr-TR", "I\u0307zmir DİYARBAKIR", "izmir diyarbakır"),
        ("az", "İKİ QIZIL", "iki qızıl"),
        ("en", "ISTANBUL", "istanbul"),
        ("lt", "Ĩ i\u0307\u0303 J\u0303 j\u0307\u0303 į\u0307\u0301", "ĩ ĩ j\u0303 j\u0303 į\u0301"),
        ("el", "ΟΔΟΣ Σοφός", "οδοσ σοφόσ"),
        ("de", "STRASSE Straße STRAẞE", "strasse strasse strasse"),
        ("ar", "كَتَبَ", "كتب"),
    ],
)
def test_letters_are_folded_by_the_languages_own_rules_of_case(language: str, text: str, same: str) -> None:
    normalize = normalizer_of(normalizer_name(SpeechConfig(language=language)), language)
    assert normalize(text) == same
    assert normalize(same) == same  # the small letters are already what they become


def test_dotless_i_is_another_letter_in_turkish_and_its_capital_is_not_that_of_i() -> None:
    turkish = normalizer_of("letters", "tr")
    assert turkish("KIZ") == turkish("kız") != turkish("kiz") == turkish("KİZ")
    assert (label("letters", "tr"), label("letters", "cs"), label("unspaced", "zh-CN")) == (
        "letters-1-tr",
        "letters-1",
        "unspaced-1",
    )
