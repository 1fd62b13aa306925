"""Speech tasks: excluded clips are counted with their files, and no sentence is in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.data.audio.speech_split import SpeechSplit
from flora_train.data.task import Task, load_tasks
from tests.hub_server import serve
from tests.hub_server.client import use_hub
from tests.speech import POSITIONS, tiny_speech_processor, write_clip, write_corpus, write_manifest


def config_of(files: dict[str, Any], **task: Any) -> RunConfig:
    task = {"speech": {"language": "cs"}, **files, **task}
    return validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": {"cs": task},
            "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
            "training": {"steps": 2, "max_length": 60, "tokens_per_step": 4000},
        }
    )


def load(files: dict[str, Any], tmp_path: Path, audio: dict[str, Any] | None = None, **task: Any) -> Task:
    speech_processor = tiny_speech_processor(tmp_path, **(audio or {}))
    return load_tasks(
        config_of(files, **task), speech_processor.tokenizer, tmp_path / "tokens", speech_processor
    )["cs"]


def test_a_clip_is_prompt_sentence_and_end(tmp_path: Path) -> None:
    task = load(write_corpus(tmp_path, "cs"), tmp_path)
    split = task.train
    assert isinstance(split, SpeechSplit)
    speech_processor = tiny_speech_processor(tmp_path)
    words = speech_processor.tokenizer.decode(split.example(1))
    assert words == "<|startoftranscript|><|cs|><|transcribe|><|notimestamps|> two fish cs 1<|endoftext|>"
    assert split.sentences[1] == "two fish cs 1"
    assert split.learnt_spans(1).tolist() == [[4, len(split.example(1))]]
    assert split.label_counts[1] == len(split.example(1)) - 4
    assert split.seconds[1] == pytest.approx(0.7)
    assert (split.lengths == np.diff(split.offsets) + POSITIONS).all()
    assert task.test is not None
    assert (len(split), len(task.validation), len(task.test)) == (10, 4, 4)


def test_windows_are_multiples_of_the_step(tmp_path: Path) -> None:
    task = load(write_corpus(tmp_path, "cs"), tmp_path, {"window_step": 0.5})
    assert isinstance(task.train, SpeechSplit)
    assert task.train.windows[:5].tolist() == [
        25,
        50,
        75,
        75,
        100,
    ]  # 0.3, 0.7, 1.1, 1.5 and 1.9 s at 50 positions a second


def test_excluded_clips_are_counted_with_their_files(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs")
    (tmp_path / "zero.mp3").touch()
    (tmp_path / "text.ogg").write_text("no sound")
    write_clip(tmp_path / "long.wav", 2.2)
    write_clip(tmp_path / "good.wav", 1.0)
    rows = [
        ("good.wav", "good one"),
        ("good.wav", "good once more"),
        ("absent.wav", "was it ever there"),
        ("zero.mp3", "nothing in it"),
        ("text.ogg", "this is text"),
        ("long.wav", "too long"),
        ("clips/cs-1.wav", "  "),
        ("clips/cs-2.wav", "red CS  202"),  # a test sentence, but for its case and spaces
        ("clips/cs-100.wav", "a clip that is in validation"),
        ("clips/cs-3.wav", "word " * 40),
    ]
    write_manifest(tmp_path / "cs.train.jsonl", rows)
    counts = load(files, tmp_path).train.counts
    left_out = {reason: [Path(path).name for path in paths] for reason, paths in counts.unusable.items()}
    assert left_out == {
        "listed twice": ["good.wav"],
        "no such file": ["absent.wav"],
        "empty file": ["zero.mp3"],
        "cannot be decoded": ["text.ogg"],
        "longer than audio.max_seconds": ["long.wav"],
        "no transcript": ["cs-1.wav"],
        "also in a held-out split": ["cs-2.wav", "cs-100.wav"],
        "transcript longer than training.max_length": ["cs-3.wav"],
    }
    assert (counts.rows, counts.examples) == (10, 1)


def test_a_changed_clip_is_not_read_from_the_cache(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs")
    first = load(files, tmp_path)
    assert load(files, tmp_path).data_hash == first.data_hash
    write_clip(tmp_path / "clips" / "cs-0.wav", 1.9, seed=77)
    second = load(files, tmp_path)
    assert second.data_hash != first.data_hash
    assert isinstance(second.train, SpeechSplit)
    assert second.train.seconds[0] == pytest.approx(1.9)


def test_held_out_clips_have_other_sentences_or_speakers(tmp_path: Path) -> None:
    for i in range(20):
        write_clip(tmp_path / f"{i}.wav", 0.4, seed=i)
    rows = [
        {"path": f"{i}.wav", "sentence": f"sentence {i % 10}", "speaker": f"speaker {i % 4}"}
        for i in range(20)
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    by_sentence = load({"train": str(tmp_path / "all.jsonl")}, tmp_path, validation_fraction=0.2)
    assert isinstance(by_sentence.train, SpeechSplit)
    assert isinstance(by_sentence.validation, SpeechSplit)
    assert not set(by_sentence.train.sentences) & set(by_sentence.validation.sentences)
    assert (len(by_sentence.train), len(by_sentence.validation)) == (16, 4)
    speech = {"language": "cs", "speaker": "speaker"}
    by_speaker = load(
        {"train": str(tmp_path / "all.jsonl")}, tmp_path, validation_fraction=0.2, speech=speech
    )
    assert isinstance(by_speaker.validation, SpeechSplit)
    held = {int(Path(path).stem) % 4 for path in by_speaker.validation.paths.tolist()}
    assert len(held) == 1


def test_audio_may_be_bytes_as_in_hub_data_sets(tmp_path: Path) -> None:
    clips = [write_clip(tmp_path / f"{i}.flac", 0.5, seed=i).read_bytes() for i in range(4)]
    rows = [
        {"audio": {"bytes": clip, "path": "x.flac"}, "text": f"sentence {i}"} for i, clip in enumerate(clips)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    speech = {"language": "cs", "audio": "audio", "sentence": "text"}
    task = load({"train": str(tmp_path / "all.parquet")}, tmp_path, speech=speech)
    assert isinstance(task.train, SpeechSplit)
    assert len(task.train) == 3
    assert all(Path(path).read_bytes() in clips for path in task.train.paths.tolist())


def test_a_hub_data_sets_audio_column_is_decoded_here(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    clips = [str(write_clip(tmp_path / f"{i}.wav", 0.5, seed=i)) for i in range(4)]
    rows = {
        "audio": [{"bytes": Path(clip).read_bytes(), "path": "clip.wav"} for clip in clips],
        "transcription": list("abcd"),
    }
    (tmp_path / "set").mkdir()
    made = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(sampling_rate=16000))
    made.to_parquet(tmp_path / "set" / "train.parquet")
    speech = {"language": "hi", "audio": "audio", "sentence": "transcription"}
    for more in ({}, {"max_rows": 3}):
        task = load({"train": {"hub": str(tmp_path / "set"), **more}}, tmp_path, speech=speech)
        assert isinstance(task.train, SpeechSplit)
        assert len(task.train) + len(task.validation) == more.get("max_rows", 4)
        assert task.train.seconds[0] == 0.5


def test_data_set_of_the_hub_cannot_name_files_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = write_clip(tmp_path / "secret.wav", 0.5)
    rows = {"audio": [{"bytes": None, "path": str(secret)}] * 2, "text": ["one", "two"]}
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "set" / "train.parquet")
    speech = {"language": "cs", "audio": "audio", "sentence": "text"}
    with serve() as hub:
        hub.add_folder("somebody/clips", tmp_path / "set", "dataset")
        use_hub(monkeypatch, hub, tmp_path / "cache")
        with pytest.raises(UserError, match="instead of a clip: data sets on the hub must hold the bytes"):
            load({"train": {"hub": "somebody/clips"}}, tmp_path, speech=speech)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            {"speech": {"language": "xx"}},
            (
                r"speech\.language = 'xx': is a language that this model has no token "
                r"for.*speech\.token=<\|xx\|>"
            ),
        ),
        (
            {"speech": {"language": "mn", "token": "<|rn|>"}},
            r"speech\.token = '<\|rn\|>': is not a language token.*Did you mean '<\|ru\|>'",
        ),
        (
            {"speech": {"language": "cs", "sentence": "sentense"}},
            r"speech\.sentence = 'sentense'.*Did you mean 'sentence'",
        ),
        (
            {"speech": {"language": "cs", "audio": "clip"}},
            r"speech\.audio = 'clip': is not a column.*it has path, sentence or speaker",
        ),
    ],
)
def test_bad_input_is_named(task: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(write_corpus(tmp_path, "cs"), tmp_path, **task)


def test_a_language_that_whisper_does_not_know_is_trained_with_a_chosen_token(tmp_path: Path) -> None:
    task = load(write_corpus(tmp_path, "cs"), tmp_path, speech={"language": "mn", "token": "<|ru|>"})
    assert "<|ru|>" in tiny_speech_processor(tmp_path).tokenizer.decode(task.train.example(0))


def test_no_usable_clip_is_an_error_that_says_why(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs")
    write_manifest(tmp_path / "cs.train.jsonl", [("absent.wav", "one"), ("absent2.wav", "two")])
    with pytest.raises(
        UserError,
        match=r"tasks\.cs\.train: no usable clip among 2: 2 no such file \(the first: .*absent\.wav\)",
    ):
        load(files, tmp_path)


@pytest.mark.parametrize(
    "train",
    [
        {"common_voice": "x", "locale": "cs", "split": "test"},
        {"hub": "x", "split": "test[:50%]"},
        {"hub": "x", "split": "train+test"},
        "a/cs.test.jsonl",
        "cv/test.tsv",
    ],
)
def test_a_test_split_is_refused_as_training_data(train: Any) -> None:
    with pytest.raises(UserError, match=r"tasks\.cs\.train.*names a test split as training data"):
        config_of({"train": train})


def test_text_and_speech_are_not_mixed() -> None:
    with pytest.raises(UserError, match=r"belongs to a task of clips, packing to a task of text"):
        config_of({"train": "a.jsonl"}, packing=True)
    raw = config_of({"train": "a.jsonl"}).model_dump(mode="json")
    raw["tasks"]["text"] = {"train": "b.jsonl"}
    with pytest.raises(UserError, match=r"tasks\.text\.speech: is missing, and tasks\.cs is a speech task"):
        validate(raw)
    with pytest.raises(UserError, match=r"common_voice and locale .* go together"):
        config_of({"train": {"common_voice": "x"}})


def test_special_tokens_in_transcripts_are_text_unless_the_task_says_otherwise(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs")
    write_manifest(
        tmp_path / "cs.train.jsonl",
        [("clips/cs-1.wav", "one<|cs|>two<|endoftext|>"), ("clips/cs-2.wav", "three")],
    )
    tokenizer = tiny_speech_processor(tmp_path).tokenizer
    special = [tokenizer.get_vocab()[word] for word in ("<|cs|>", "<|endoftext|>")]
    for as_tokens, counts in (
        (False, (1, 1)),
        (True, (2, 1)),
    ):  # the end token stands once, whoever writes it
        split = load(files, tmp_path, special_tokens=as_tokens).train
        example = split.example(0).tolist()
        assert tuple(example.count(i) for i in special) == counts
        assert split.counts.special_tokens == {"<|cs|>": 1, "<|endoftext|>": 1}
    words = "<|startoftranscript|><|cs|><|transcribe|><|notimestamps|> three<|endoftext|>"
    assert tokenizer.decode(split.example(1)) == words


def test_missing_values_are_not_transcripts(tmp_path: Path) -> None:
    files = write_corpus(tmp_path, "cs")
    rows = [
        {"path": f"clips/cs-{i}.wav", "sentence": float("nan") if i == 1 else f"said {i}"} for i in (1, 2, 3)
    ]
    (tmp_path / "cs.train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = load(files, tmp_path).train.counts
    assert [Path(path).name for path in counts.unusable["no transcript"]] == ["cs-1.wav"]
    assert counts.examples == 2


def test_a_transcript_of_megabytes_is_tokenised_only_in_part(tmp_path: Path) -> None:
    speech_processor = tiny_speech_processor(tmp_path)
    tokens, _ = speech_processor.transcript([1], "word " * 2_000_000)
    assert speech_processor.max_tokens < len(tokens) < 200_000
