"""recipe=common_voice as it stands: a release in the official layout, and a tiny Whisper from a local hub."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flora_train.evaluation.speech.error_rates import character_errors, word_errors
from flora_train.evaluation.speech.normalize import normalizer_of
from tests.forked import ROOT
from tests.headline.build_speech import LEFT_OUT, RELEASE, SENTENCES
from tests.headline.runs import Finished, command, done, hub_environment, launched
from tests.headline.speech_material import FULL, SHORT, SPEECH_SIZES, built_speech, release_of
from tests.hub_server import Hub, serve

LANGUAGES = {"ar": 50272, "cs": 50283, "lt": 50293, "mr": 50320, "mn": 50314, "hi": 50276}
"""Language -> id of its token in every multilingual Whisper."""
NORMALISERS = dict.fromkeys(LANGUAGES, "letters-1") | {"ar": "arabic-1", "lt": "letters-1-lt"}
FAMILIES = {"flora": 1, "flora_rank4": 4, "lora": 1, "lora_rank4": 4, "ia3": None}
"""Family -> rank."""
LAYERS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
"""Every fully-connected layer of Whisper."""
SMALLER = {
    *("training.steps", "training.max_length", "training.tokens_per_step", "training.tokens_per_microbatch"),
    *("mixture.examples_per_draw", "audio.window_step", "evaluation.bootstrap_samples"),
    *("evaluation.max_examples", "evaluation.max_new_tokens", "evaluation.batch_rows"),
}
"""Keys that may differ from the recipe."""
REPOSITORY = "me/six-languages"
COMPARED = ("mn-flora", "mr-flora_rank4", "hi-lora", "ar-lora_rank4", "cs-ia3")
CLIP = """
import sys
import numpy as np, torch
from transformers import AutoFeatureExtractor
extractor = AutoFeatureExtractor.from_pretrained("openai/whisper-large")
noise = np.random.default_rng(0).standard_normal(16000 * 3)
features = extractor(noise, sampling_rate=16000, return_tensors="pt").input_features
ids, arrays = torch.tensor([[50258, 50314, 50359, 50363, 220]]), {}
"""
PEFT_LOGITS = f"""{CLIP}
from peft import PeftModel
from transformers import AutoModelForSpeechSeq2Seq
for name in sys.argv[3:]:
    base = AutoModelForSpeechSeq2Seq.from_pretrained("openai/whisper-large", dtype=torch.float32)
    with torch.no_grad():
        arrays["base"] = base.eval()(input_features=features, decoder_input_ids=ids).logits.numpy()
        adapted = PeftModel.from_pretrained(base, sys.argv[1], subfolder=name).eval()
        arrays[name] = adapted(input_features=features, decoder_input_ids=ids).logits.numpy()
assert "flora_train" not in sys.modules
np.savez(sys.argv[2], **arrays)
"""
"""Logits by plain transformers and peft: REPOSITORY FILE ADAPTER..."""
BANK_LOGITS = f"""{CLIP}
from flora_train.run_context import load_run
context, _ = load_run(sys.argv[1], with_tasks=True, dtype="float32")
for name in sys.argv[3:]:
    with torch.no_grad(), context.bank.routed([name]):
        arrays[name] = context.model(input_features=features, decoder_input_ids=ids).logits.numpy()
for task in context.tasks.values():
    arrays["first tokens of " + task.name] = task.train.example(0)[:4]
context.close()
np.savez(sys.argv[2], **arrays)
"""
"""Logits of the run's bank, and the first tokens of each language: RUN FILE ADAPTER..."""

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed: apt-get install espeak-ng"
)


@pytest.fixture(scope="session")
def speech_material() -> Path:
    """A release with six languages, and openai/whisper-large."""
    return built_speech(SHORT)


@pytest.fixture(scope="session")
def release(speech_material: Path) -> Path:
    """The release's folder."""
    return release_of(speech_material)


@contextmanager
def speech_hub(material: Path) -> Iterator[Hub]:
    """A hub with openai/whisper-large."""
    with serve() as hub:
        hub.add_folder("openai/whisper-large", material / "models" / "openai" / "whisper-large")
        yield hub


@contextmanager
def finished_run(
    material: Path, folder: Path, *words: str, source: Path | None = None, processes: int = 1
) -> Iterator[Finished]:
    """recipe=common_voice, run to its end. source: the release, or a folder of its archives."""
    with speech_hub(material) as hub:
        environment = hub_environment(hub.url, folder / "home")
        run = folder / "run"
        data = f"tasks.ar.train.common_voice={source or release_of(material)}"
        started = launched("common_voice", run, data, *words, processes=processes)
        ended = done(started, environment, timeout=3600)
        assert ended.returncode == 0, ended.stderr
        yield Finished(run, hub, environment, ended.stdout, ended.stderr)


@pytest.mark.full
@needs_espeak
def test_recipe_runs_as_it_stands_from_clips_to_adapters_on_the_hub(
    speech_material: Path, tmp_path: Path
) -> None:
    with finished_run(speech_material, tmp_path, *SPEECH_SIZES) as finished:
        check_configuration(finished)
        check_adapters(finished)
        check_clips_left_out(finished)
        check_error_rates(finished, release_of(speech_material))
        check_page(finished)
        check_requests(finished)
        check_pushed_adapters(finished, tmp_path)


@pytest.mark.headline
@needs_espeak
def test_recipe_runs_with_its_own_lengths_and_data_limits(tmp_path: Path) -> None:
    """Whole windows of 30 s, and steps of 300,000 positions and tokens, of which two are trained."""
    with finished_run(built_speech(FULL), tmp_path, "training.steps=2") as finished:
        check_adapters(finished)
        for task in finished.report["tasks"]:
            assert task["validation"]["examples"] == 200, "task_defaults.max_validation_examples"
            assert task["validation"]["unsampled"] == FULL[1] - 200
        for result in finished.report["results"]:
            assert result["examples"] == 200, "the final evaluation has all held-out examples"
        records = map(json.loads, (finished.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        limits = [record["max_examples"] for record in records if record["kind"] == "evaluation"]
        assert limits == [100], "evaluation.max_examples"
        for adapter in finished.report["adapters"]:
            clips = 2 * 6
            assert clips * 1500 < adapter["tokens"] < clips * 1948, "six clips a step, and no seventh draw"
        speech = finished.report["speech"]
        assert speech["max_new_tokens"] == 224
        assert speech["window_step"] is None
        assert [part["clips"] for part in speech["languages"]] == [FULL[2]] * 6


@pytest.mark.full
@needs_espeak
def test_a_missing_release_or_language_is_named_once_before_any_clip_is_read(
    speech_material: Path, tmp_path: Path
) -> None:
    with speech_hub(speech_material) as hub:
        environment = hub_environment(hub.url, tmp_path / "home")
        archive = speech_material / "archives" / f"{RELEASE}-ar.tar.gz"
        expected = {tmp_path / "nothing": ["ar"], archive: ["cs", "lt", "mr", "mn", "hi"]}
        for source, languages in expected.items():
            data = f"tasks.ar.train.common_voice={source}"
            refused = done(launched("common_voice", tmp_path / "run", data), environment)
            assert refused.returncode != 0
            errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
            assert [error.split(".")[1] for error in errors] == languages
            assert "read clips" not in refused.stderr
            assert not any("model.safetensors" in path for method, path in hub.asked if method == "GET")


def check_configuration(finished: Finished) -> None:
    """Nothing but the sizes and the release's path differs from the recipe."""
    assert {word.partition("=")[0] for word in SPEECH_SIZES} <= SMALLER
    recipe = flat(yaml.safe_load((ROOT / "recipes" / "common_voice.yaml").read_text(encoding="utf-8")))
    ran = flat(yaml.safe_load((finished.run / "config.yaml").read_text(encoding="utf-8")))
    for key, value in recipe.items():
        if key not in {*SMALLER, "data_config"}:
            assert ran[key] == value, key


def check_adapters(finished: Finished) -> None:
    """Six languages train 30 adapters of both ranks at once, in every fully-connected layer."""
    adapters = {adapter["name"]: adapter for adapter in finished.report["adapters"]}
    assert set(adapters) == {f"{language}-{family}" for language in LANGUAGES for family in FAMILIES}
    for name, adapter in adapters.items():
        assert adapter["tokens"] > 0, name
        if adapter["method"] != "ia3":
            assert adapter["rank"] == FAMILIES[adapter["family"]]
        content = (finished.run / "adapters" / name / "adapter_config.json").read_text(encoding="utf-8")
        assert set(json.loads(content)["target_modules"]) <= LAYERS
        if adapter["method"] != "ia3":
            assert set(json.loads(content)["target_modules"]) == LAYERS
    for result in finished.report["results"]:
        values = [row["bits_per_byte"]["value"] for row in (result["base"], *result["contenders"])]
        assert np.isfinite(values).all()
        assert len(set(values)) == 6, "every adapter has learnt something of its own"


def check_clips_left_out(finished: Finished) -> None:
    """Every odd row is counted and listed; a missing clip is named before any clip is read."""
    for task in finished.report["tasks"]:
        counts = {reason: group["clips"] for reason, group in task["train"]["unusable"].items()}
        assert counts == LEFT_OUT, task["name"]
        assert task["origin"] == RELEASE
    listed = (finished.run / "clips_left_out.tsv").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 1 + len(LANGUAGES) * (sum(LEFT_OUT.values()) + 1)
    said = finished.stderr
    for language in LANGUAGES:
        note = re.search(rf"tasks\.{language}\.train: 1 of \d+ clips are missing .*\.mp3\)", said)
        assert note is not None
        assert note.start() < said.index("read clips of"), "known before the first clip is read"
    assert "Traceback" not in said
    assert "libmpg123" not in said
    assert "is not used" not in said, "the recipe has no key without an effect"


def check_error_rates(finished: Finished, release: Path) -> None:
    """WER and CER of every contender are those that are counted here, from the tables and the transcripts."""
    texts: dict[tuple[str, str], dict[int, str]] = {}
    for file in (finished.run / "eval" / "speech").glob("transcripts-*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts.setdefault((row["task"], row["adapter"]), {})[row["example"]] = row["text"]
    for part in finished.report["speech"]["languages"]:
        language = part["task"]
        assert part["token"] == f"<|{language}|>"
        assert part["normalizer"] == NORMALISERS[language]
        assert part["metric"] == "wer_normalized"
        references = sorted(sentences_of(release / language / "test.tsv"))
        assert [contender["family"] for contender in part["contenders"]] == ["base", *FAMILIES]
        for contender in part["contenders"]:
            adapter = contender["name"] if contender["family"] != "base" else "__base__"
            transcripts = texts[language, adapter]
            assert len(transcripts) == part["clips"] == len(references)
            words = sum(len(plain(text).split()) for text in references)
            assert contender["wer_normalized"]["units"] == words
            assert contender["cer"]["units"] == sum(len(plain(text)) for text in references)
            assert contender["wer"]["units"] == sum(len(text.split()) for text in references)
            for rate in ("wer", "wer_normalized", "cer"):
                counts = contender[rate]
                errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
                assert counts["value"] == pytest.approx(errors / counts["units"])


def check_page(finished: Finished) -> None:
    """Arabic is written from right to left, the others from left to right."""
    page = (finished.run / "eval" / "report.html").read_text(encoding="utf-8")
    assert '<dd lang="ar" dir="rtl">' in page
    for language in LANGUAGES:
        if language != "ar":
            assert f'<dd lang="{language}" dir="ltr">' in page
    for family in FAMILIES:
        assert f'<th scope="col">{family}</th>' in page


def check_requests(finished: Finished) -> None:
    """Weights are downloaded in one form."""
    asked = [path for _, path in finished.hub.asked]
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not any(path.endswith((".bin", ".h5", ".msgpack")) and "resolve" in path for path in asked)


def check_pushed_adapters(finished: Finished, tmp_path: Path) -> None:
    """Loaded from the hub by plain PEFT, they give the logits of the bank; languages have their tokens."""
    pushed = done(command("push", str(finished.run), "--repo", REPOSITORY), finished.environment)
    assert pushed.returncode == 0, pushed.stderr
    for adapter in finished.report["adapters"]:
        assert f"{adapter['name']}/adapter_model.safetensors" in finished.hub.repos[REPOSITORY].files
    program, theirs, ours = tmp_path / "peft_logits.py", tmp_path / "theirs.npz", tmp_path / "ours.npz"
    program.write_text(PEFT_LOGITS, encoding="utf-8")
    environment = {**finished.environment, "PYTHONPATH": ""}
    words = [sys.executable, str(program), REPOSITORY, str(theirs), *COMPARED]
    loaded = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert loaded.returncode == 0, loaded.stderr
    words = [sys.executable, "-c", BANK_LOGITS, str(finished.run), str(ours), *COMPARED]
    computed = done(words, finished.environment)
    assert computed.returncode == 0, computed.stderr
    peft, bank = np.load(theirs), np.load(ours)
    for name in COMPARED:
        np.testing.assert_allclose(peft[name], bank[name], rtol=1e-4, atol=1e-4, err_msg=name)
        error = np.abs(peft[name] - bank[name]).max()
        assert np.abs(peft[name] - peft["base"]).max() > max(1e-4, 4 * error), name
    for language, token in LANGUAGES.items():
        assert bank[f"first tokens of {language}"].tolist() == [50258, token, 50359, 50363]


@pytest.mark.parametrize(
    ("language", "reference", "transcript", "words", "characters"),
    [
        # a vowel sign is wrong, and a danda is missing: one of five words, one of 24 characters
        ("hi", "लड़का सुबह पैदल स्कूल गया।", "लड़का सुबह पैदल स्कुल गया", (1, 5), (1, 25)),
        # the sign of the plural is missing at the end of a word
        ("mr", "मुले रस्त्यावर क्रिकेट खेळतात.", "मुल रस्त्यावर क्रिकेट खेळतात", (1, 4), (1, 29)),
        # short vowels and tatweel do not count; a hamza does
        ("ar", "الكِتابُ على الطاوِلَةِ.", "الكتاب علـى الطاولة", (0, 3), (0, 18)),
        ("ar", "هذا السؤال أسهل", "هذا السؤال اسهل", (1, 3), (1, 15)),
        # the letters of Mongolian that Russian does not have
        ("mn", "Хүүхдүүд гудамжинд тоглож байна.", "хуухдууд гудамжинд тоглож байна", (1, 4), (4, 31)),
        # composed and decomposed letters are the same, quotation marks do not count
        ("lt", "Mokytojas tarė, „perskaityk“.", "mokytojas tare\u0307 perskaityk", (0, 3), (0, 25)),
        ("cs", "Učitel řekl, „přečti si to“.", "učitel rekl přečti si to", (1, 5), (1, 24)),
    ],
)
def test_errors_of_each_script_are_those_counted_by_hand(
    language: str, reference: str, transcript: str, words: tuple[int, int], characters: tuple[int, int]
) -> None:
    name = NORMALISERS[language].partition("-")[0]
    normalize = normalizer_of(name, language)
    pair = [normalize(reference)], [normalize(transcript)]
    by_word, by_character = word_errors(*pair), character_errors(*pair)
    assert (int(by_word.total.sum()), int(by_word.units.sum())) == words
    assert (int(by_character.total.sum()), int(by_character.units.sum())) == characters


def test_sentences_are_written_for_every_language() -> None:
    assert set(SENTENCES) == set(LANGUAGES)
    assert all(len(set(sentences)) == 24 for sentences in SENTENCES.values())


def sentences_of(table: Path) -> Sequence[str]:
    """The sentences of a table without odd rows."""
    header, *lines = table.read_text(encoding="utf-8-sig").splitlines()
    column = header.split("\t").index("sentence")
    return [line.split("\t")[column] for line in lines]


def plain(text: str) -> str:
    """Lower case, without punctuation, short vowels of Arabic and tatweel: written anew for this test."""
    letters = []
    for character in unicodedata.normalize("NFC", text.lower()):
        if "\u064b" <= character <= "\u0652" or character == "\u0640":
            continue
        counted = unicodedata.category(character)[0] in "LMN"
        letters.append(character if counted else " ")
    return " ".join("".join(letters).split())


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts: dict[str, Any] = {}
    for key, inner in value.items():
        parts |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return parts
