"""A speech run from recipe to error rates: one and two processes, taken up again, loaded by plain peft."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GenerationConfig,
    pipeline,
)

from flora_train.commands.export import export_adapters
from flora_train.config.load import load_config
from flora_train.data.tokenization import pad_token
from flora_train.run_context import load_data
from flora_train.training.step_cost import cost_of_a_step, measure
from tests.e2e.conftest import Launch
from tests.forked import python
from tests.other_speech import save_tiny
from tests.speech import MEL_BINS, POSITIONS, save_tiny_whisper, write_clip, write_corpus, write_manifest

LANGUAGES = ("en", "cs")


@pytest.fixture(scope="module")
def speech_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    tasks = {}
    for language in LANGUAGES:
        tasks[language] = {"speech": {"language": language}, **write_corpus(folder, language, held=3)}
    with (folder / "cs.train.jsonl").open("a") as manifest:
        manifest.write(
            json.dumps({"path": "absent.wav", "sentence": "never recorded", "speaker": "x"}) + "\n"
        )
    model = save_tiny_whisper(folder / "model")
    tokenizer_file = model / "tokenizer_config.json"
    settings = json.loads(tokenizer_file.read_text()) | {"tokenizer_class": "WhisperTokenizer"}
    tokenizer_file.write_text(json.dumps(settings))
    content = {
        "name": "tiny_speech",
        "num_threads": 1,
        "model": {"path": str(model), "dtype": "float32"},
        "tasks": tasks,
        "adapters": {
            "flora": {"method": "flora", "rank": 2, "lr": 0.02},
            "lora": {"method": "lora", "rank": 2, "lr": 0.02, "parent_module": "decoder"},
        },
        "audio": {"window_step": 0.5, "spec_augment": True, "workers": 1},
        "training": {
            "steps": 4,
            "tokens_per_step": 900,
            "tokens_per_microbatch": 600,
            "max_length": 40,
            "log_every": 2,
        },
        "evaluation": {"max_new_tokens": 8, "bootstrap_samples": 200},
    }
    path = folder / "tiny_speech.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_plan_counts_the_layers_of_encoder_and_decoder_apart(speech_recipe: Path, tmp_path: Path) -> None:
    """As in a Whisper turbo, whose decoder is shallow: the cost of two numbers of layers is extrapolated."""
    config = load_config([f"recipe={speech_recipe}", f"output_dir={tmp_path / 'run'}", "audio.workers=0"])
    shallow = tmp_path / "shallow"
    shutil.copytree(config.model.path, shallow)
    (shallow / "model.safetensors").unlink()  # no weights are read
    settings = json.loads((shallow / "config.json").read_text())
    layers = {"encoder_layers": 5, "num_hidden_layers": 5, "decoder_layers": 2}
    (shallow / "config.json").write_text(json.dumps(settings | layers))
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(shallow)})})
    device = torch.device("cpu")
    tokenizer, tasks, processor = load_data(config)
    assert processor is not None
    measured = partial(
        measure, config, device, tasks, pad_token=pad_token(tokenizer), speech_processor=processor
    )
    try:
        whole = measured(layers=5, decoder_layers=2)
        cost = cost_of_a_step(
            config, device, tasks, pad_token=pad_token(tokenizer), speech_processor=processor
        )
        least = measured(layers=2, decoder_layers=2)
    finally:
        processor.store.close()
    assert whole.activations > 1.5 * least.activations
    assert cost.activations == pytest.approx(whole.activations, rel=0.03)


@pytest.fixture(scope="module")
def finished(speech_recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    done = launch(f"recipe={speech_recipe}", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval" / "report.json").read_text())


def transcripts_of(folder: Path) -> dict[tuple[str, str, int], str]:
    lines = [
        line
        for file in (folder / "eval" / "speech").glob("transcripts-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    found = [json.loads(line) for line in lines]
    assert len({(row["adapter"], row["task"], row["example"]) for row in found}) == len(found)
    return {(row["adapter"], row["task"], row["example"]): row["text"] for row in found}


def test_the_report_has_error_rates_of_base_and_adapters(finished: Path) -> None:
    speech = report_of(finished)["speech"]
    assert [part["task"] for part in speech["languages"]] == list(LANGUAGES)
    for part in speech["languages"]:
        assert [contender["family"] for contender in part["contenders"]] == ["base", "flora", "lora"]
        assert [(d["first"], d["second"]) for d in part["differences"]] == [
            ("flora", "base"),
            ("lora", "base"),
            ("flora", "lora"),
        ]
        assert part["contenders"][0]["wer"]["clips"] == 3
        assert part["utterances"][0]["audio"].startswith("data:audio/ogg;base64,")
    assert len(transcripts_of(finished)) == 2 * 3 * 3
    for task in report_of(finished)[
        "tasks"
    ]:  # clips of 0.3 to 1.9 s in windows of 0.5 s steps, 50 positions a second
        whole = 2 * (25 + 50 + 75 + 75 + 100) + task["train"]["tokens"]
        assert task["epochs"] == pytest.approx(task["tokens_drawn"] / whole)
    page = (finished / "eval" / "report.html").read_text()
    assert "Error rates" in page
    assert "Whether completions are correct" not in page


def test_unusable_clips_are_counted_and_listed(finished: Path) -> None:
    listed = (finished / "clips_left_out.tsv").read_text().splitlines()
    assert listed[0] == "task\tsplit\treason\tfile"
    assert [line.rpartition("/")[2] for line in listed[1:]] == ["absent.wav"]
    assert listed[1].startswith("cs\ttrain\tno such file\t")
    assert "note: 1 clips are left out (1 no such file)" in (finished / "said.txt").read_text()
    train = next(task for task in report_of(finished)["tasks"] if task["name"] == "cs")["train"]
    assert train["unusable"]["no such file"]["clips"] == 1


def test_two_processes_hear_the_same(
    speech_recipe: Path, finished: Path, launch: Launch, tmp_path: Path
) -> None:
    done = launch(f"recipe={speech_recipe}", f"output_dir={tmp_path}/two", "num_processes=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "two" / "eval" / "speech").glob("transcripts-*.jsonl"))) == 2
    one, two = transcripts_of(finished), transcripts_of(tmp_path / "two")
    assert one.keys() == two.keys()
    base = [key for key in one if key[0] == "__base__"]
    assert [one[key] for key in base] == [two[key] for key in base]


def test_transcripts_that_are_there_are_kept(finished: Path, launch: Launch, tmp_path: Path) -> None:
    (log,) = (finished / "eval" / "speech").glob("transcripts-*.jsonl")
    before = transcripts_of(finished)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]) + lines[5][:10])  # killed while it wrote the sixth
    (finished / "eval" / "report.json").unlink()
    facts = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps({**facts, "finished": False}))
    done = launch(f"recipe={finished}/config.yaml", f"output_dir={finished}", "resume=true")
    assert done.returncode == 0, done.stderr
    assert transcripts_of(finished) == before
    assert log.read_text().startswith("".join(lines[:5]))


def test_peft_loads_what_was_trained(speech_recipe: Path, finished: Path) -> None:
    base = AutoModelForSpeechSeq2Seq.from_pretrained(speech_recipe.parent / "model").eval()
    features = torch.randn(1, MEL_BINS, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        before = base(**inputs).logits.clone()
        model = PeftModel.from_pretrained(base, finished / "adapters" / "cs-lora").eval()
        assert all(
            ".decoder." in name for name, _ in model.named_modules() if name.endswith("lora_A.default")
        )
        assert (model(**inputs).logits - before).abs().max() > 1e-4


def run_snippet(folder: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """The snippet of the card in this folder, run beside it with a clip."""
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert snippet is not None
    write_clip(place / "clip.wav", 1.0)
    program = snippet[1].replace("clip.wav", str(place / "clip.wav"))
    return python("-c", program, folder=folder.parent)


def test_the_snippet_of_a_card_transcribes_a_clip(finished: Path, tmp_path: Path) -> None:
    card = (finished / "adapters" / "cs-lora" / "README.md").read_text()
    assert '["<|startoftranscript|>", "<|cs|>", "<|transcribe|>", "<|notimestamps|>"]' in card
    done = run_snippet(finished / "adapters" / "cs-lora", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_merged_model_works_in_a_transformers_pipeline(
    speech_recipe: Path, finished: Path, tmp_path: Path
) -> None:
    (folder,) = export_adapters(finished, ["cs-flora"], as_="merged", out=str(tmp_path / "merged"))
    base = speech_recipe.parent / "model"
    assert (
        AutoFeatureExtractor.from_pretrained(folder).to_dict()
        == AutoFeatureExtractor.from_pretrained(base).to_dict()
    )
    generation = GenerationConfig.from_pretrained(folder).to_dict()
    assert generation == GenerationConfig.from_pretrained(base).to_dict()
    assert type(AutoProcessor.from_pretrained(folder)) is type(AutoProcessor.from_pretrained(base))
    audio, _ = soundfile.read(write_clip(tmp_path / "clip.wav", 1.0), dtype="float32")
    texts = []
    for model in (folder, base):
        transcribe = pipeline("automatic-speech-recognition", model=str(model))
        texts.append(transcribe(audio, generate_kwargs={"max_new_tokens": 8})["text"])
    assert texts[0] != texts[1]


def test_a_text_recipe_on_a_speech_model_is_one_clear_error(
    speech_recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 4)
    raw = yaml.safe_load(speech_recipe.read_text())
    raw["tasks"] = {"a": {"train": str(tmp_path / "a.jsonl")}}
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(raw))
    done = launch(f"recipe={tmp_path}/text.yaml", f"output_dir={tmp_path}/run")
    assert done.returncode != 0
    assert "is a speech model: its tasks need tasks.NAME.speech" in done.stderr


def test_too_few_usable_clips_are_named_before_the_model_is_loaded(
    speech_recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    write_manifest(tmp_path / "none.jsonl", [("absent.wav", "one")])
    done = launch(
        f"recipe={speech_recipe}", f"output_dir={tmp_path}/run", f"tasks.en.test={tmp_path}/none.jsonl"
    )
    assert done.returncode != 0
    assert "tasks.en.test: no usable clip among 1: 1 no such file" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_another_encoder_decoder_trains_and_is_measured(
    launch: Launch, speech_recipe: Path, tmp_path: Path
) -> None:
    words = [
        f"recipe={speech_recipe}",
        f"model.path={save_tiny('moonshine', tmp_path / 'model')}",
        f"output_dir={tmp_path / 'run'}",
    ]
    refused = launch(*words)
    assert "error: audio.spec_augment = True: is for Whisper" in refused.stderr
    done = launch(*words, "audio.spec_augment=false", "training.steps=2", "training.tokens_per_step=2000")
    assert done.returncode == 0, done.stderr
    for part in report_of(tmp_path / "run")["speech"]["languages"]:
        assert [contender["family"] for contender in part["contenders"]] == ["base", "flora", "lora"]
        assert all(contender["wer"]["units"] > 0 for contender in part["contenders"])
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    PeftModel.from_pretrained(base, tmp_path / "run" / "adapters" / "cs-lora")
    transcribed = run_snippet(tmp_path / "run" / "adapters" / "cs-lora", tmp_path)
    assert transcribed.returncode == 0, transcribed.stderr
