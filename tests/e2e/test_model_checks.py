"""What a model cannot do is said by `train` and `plan` in one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from flora_train.cli import main
from flora_train.commands.train import train_run
from flora_train.config.errors import UserError
from flora_train.config.load import load_config
from flora_train.evaluation.generation.context_limit import check_prompts
from flora_train.run_context import check_transcripts, load_data
from tests.families import family_config
from tests.speech import tiny_speech_processor
from tests.unit.data.conftest import byte_tokenizer

POSITIONS = 24


def save(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def gpt2(rows: int | None = None) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "bos_token_id": None}
    tokenizer = byte_tokenizer()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=rows or len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes)
    )


def recipe(folder: Path, model: Path, rows: list[dict[str, str]], **task: Any) -> list[str]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "name": "checked",
        "num_threads": 1,
        "output_dir": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32"},
        "tasks": {"one": {"train": str(folder / "rows.jsonl"), **task}},
        "adapters": {"lora": {"method": "lora", "rank": 2, "lr": 0.01}},
        "training": {"steps": 2, "tokens_per_step": 128, "max_length": 64},
        "evaluation": {"max_new_tokens": 4, "bootstrap_samples": 100},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return [f"recipe={path}"]


SHORT = [{"text": f"text {i}"} for i in range(30)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("command", ["train", "plan"])
def test_an_example_longer_than_the_positions_is_one_error(command: str, tmp_path: Path, capfd: Any) -> None:
    words = recipe(tmp_path, save(tmp_path / "model", gpt2()), [*SHORT, {"text": "x" * 40}])
    assert main([command, *words]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert said == [
        (
            "error: training.max_length = 64: tasks.one.train has an example of 41 tokens, and the model has "
            "positions for 24: give at most 24"
        )
    ]
    assert not (tmp_path / "run").exists()


def test_the_limit_of_an_error_is_one_that_works(tmp_path: Path) -> None:
    words = recipe(tmp_path, save(tmp_path / "model", gpt2()), [*SHORT, {"text": "x" * 40}])
    train_run(load_config([*words, "training.max_length=24"]))
    assert (tmp_path / "run" / "eval" / "report.html").exists()


def longrope() -> Any:
    """Positions of all rows are others as soon as one row of the batch has more than 16 tokens."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
    }
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "partial_rotary_factor": 1.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    tokenizer = byte_tokenizer()
    ends = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    config = Phi3Config(
        max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope, **sizes, **ends
    )
    return Phi3ForCausalLM(config)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_an_example_that_changes_its_neighbours_positions_is_one_error(
    command: str, tmp_path: Path, capfd: Any
) -> None:
    words = recipe(tmp_path, save(tmp_path / "model", longrope()), [*SHORT, {"text": "x" * 20}])
    assert main([command, *words]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert (
        "training.max_length = 64: tasks.one.train has an example of 21 tokens; beyond 16 the model "
        "recomputes" in said[0]
    )
    load_data(load_config([*words, "training.max_length=16"]))


def test_texts_that_change_their_neighbours_positions_are_refused(tmp_path: Path) -> None:
    words = recipe(tmp_path, save(tmp_path / "model", longrope()), SHORT, sample_prompts=["x" * 10])
    with pytest.raises(
        UserError, match=r"max_new_tokens = 7: with a prompt of 10 tokens is more than the 16 up to which"
    ):
        train_run(load_config([*words, "evaluation.max_new_tokens=7"]))


def test_positions_that_begin_late_are_counted_as_the_model_does(tmp_path: Path) -> None:
    """RoBERTa's first position is that after its padding token: the table says more than can be read."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(
        vocab_size=len(tokenizer), is_decoder=True, max_position_embeddings=40, pad_token_id=1, **sizes
    )
    words = recipe(
        tmp_path, save(tmp_path / "model", RobertaForCausalLM(config)), [*SHORT, {"text": "x" * 38}]
    )
    with pytest.raises(
        UserError, match=r"example of 39 tokens, and the model has positions for 38: give at most 38"
    ):
        load_data(load_config(words))
    load_data(load_config([*words, "training.max_length=38"]))


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_padding_token_beyond_the_embedding_is_one_error(command: str, tmp_path: Path, capfd: Any) -> None:
    tokenizer = byte_tokenizer()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    words = recipe(tmp_path, save(tmp_path / "model", gpt2(known), tokenizer), SHORT)
    assert main([command, *words]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert (
        f"padding token '[PAD]' has the id {known}, and the model has the tokens 0 to {known - 1}" in said[0]
    )


def test_a_token_of_the_data_beyond_the_embedding_names_the_split(tmp_path: Path) -> None:
    words = recipe(
        tmp_path, save(tmp_path / "model", gpt2(110)), [{"text": f"text {i} é"} for i in range(30)]
    )
    with pytest.raises(
        UserError,
        match=r"tasks\.one\.train: holds the token .* with the id \d+, and the model has the tokens 0 to 109",
    ):
        load_data(load_config(words))


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_prompt_without_room_is_one_error(command: str, tmp_path: Path, capfd: Any) -> None:
    words = recipe(tmp_path, save(tmp_path / "model", gpt2()), SHORT, sample_prompts=["x" * 10])
    assert main([command, *words, "evaluation.max_new_tokens=15"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert said == [
        "error: evaluation.max_new_tokens = 15: "
        "with a prompt of 10 tokens is more than the 24 that the model can read: "
        "give at most 14"
    ]


def test_a_prompt_without_a_token_or_with_an_unknown_one_is_refused(tmp_path: Path) -> None:
    model, tokenizer = gpt2(), byte_tokenizer()
    config = load_config(recipe(tmp_path, save(tmp_path / "model", model), SHORT)).model
    for text, rows, words in (
        ("", 500, "has no tokens"),
        ("é", 110, r"has the token .* with the id \d+, but the model"),
    ):
        with pytest.raises(UserError, match=rf"^tasks\.one\.sample_prompts.*: {words}"):
            check_prompts(
                tokenizer,
                {"tasks.one.sample_prompts": ([text], True)},
                vocabulary=rows,
                model=config,
                model_config=model.config,
                max_new_tokens=4,
            )


def test_transcripts_longer_than_the_decoders_positions_are_refused(tmp_path: Path) -> None:
    tasks = {"cs": {"train": "clips.tsv", "speech": {"language": "cs"}}}
    raw = {
        "name": "x",
        "model": {"path": "x"},
        "tasks": tasks,
        "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
    }
    path = tmp_path / "speech.yaml"
    path.write_text(yaml.safe_dump({**raw, "training": {"steps": 1}}))
    speech_processor = tiny_speech_processor(tmp_path)
    check_transcripts(load_config([f"recipe={path}", "evaluation.max_new_tokens=93"]), speech_processor)
    with pytest.raises(
        UserError,
        match=r"max_new_tokens = 94: is more than the decoder has positions for \(96, .*: give at most 93",
    ):
        check_transcripts(load_config([f"recipe={path}", "evaluation.max_new_tokens=94"]), speech_processor)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        (
            "mamba",
            [
                "no adapter is attached to backbone.layers.*.mixer.dt_proj (2): does not run",
                "by its own generate",
            ],
        ),
        ("lfm2", ["by its own generate"]),
        (
            "phimoe",
            ["no adapter is attached to model.layers.*.mlp.router (2): returns a tuple, not a tensor"],
        ),
    ],
)
def test_run_reports_what_it_leaves_out_and_finishes(
    name: str, notes: list[str], tmp_path: Path, capfd: Any
) -> None:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = family_config(
        name, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id
    )
    words = recipe(
        tmp_path,
        save(tmp_path / "model", AutoModelForCausalLM.from_config(config)),
        SHORT,
        sample_prompts=["te"],
    )
    assert main(["plan", *words]) == 0
    planned = capfd.readouterr().err
    assert main(["train", *words]) == 0
    said = capfd.readouterr().err
    for note in notes:
        assert said.count(note) == 1, said
        assert planned.count(note) == ("no adapter" in note), planned
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())
    assert set(report["completions"][0]["completions"]) == {"base", "lora"}


@pytest.mark.parametrize("command", ["train", "plan"])
def test_model_with_indistinguishable_rows_is_refused_by_plan_and_train(
    command: str, tmp_path: Path, capfd: Any
) -> None:
    tokenizer = byte_tokenizer()
    config = family_config("xlnet", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    words = recipe(tmp_path, save(tmp_path / "model", AutoModelForCausalLM.from_config(config)), SHORT)
    assert main([command, *words]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1
    assert said[0].startswith(
        "error: model = 'XLNetLMHeadModel': does not have its rows first: transformer.layer.0.ff.layer_1 gets"
    )
    assert not (tmp_path / "run").exists()
