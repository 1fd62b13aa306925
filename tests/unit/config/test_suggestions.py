"""Options of other trainers and former names are answered with the key that is meant, in any section."""

from __future__ import annotations

import pytest

from flora_train.config.suggestion_table import SUGGESTIONS
from flora_train.config.suggestions import all_keys, suggest_word
from tests.unit.config.helpers import faults, loading_faults

ALL = [(word, suggestion.key) for word, suggestions in SUGGESTIONS.items() for suggestion in suggestions]
SECTIONS = {
    "top": "",
    "training": "training.",
    "evaluation": "evaluation.",
    "adapter": "adapters.lora.",
    "task": "tasks.lua.",
}


def suggested(dotted: str) -> str:
    """The line about an unknown key."""
    return faults(**{dotted.replace(".", "__"): 1})[dotted]


@pytest.mark.parametrize(("word", "key"), ALL)
def test_every_suggestion_is_a_key_of_the_configuration(word: str, key: str) -> None:
    assert key in all_keys()


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_word_gets_one_of_its_suggestions_in_every_section(section: str) -> None:
    for word, suggestions in SUGGESTIONS.items():
        keys = {suggestion.key for suggestion in suggestions}
        keys |= {
            key.replace("adapters.NAME", "adapters.lora").replace("tasks.NAME", "tasks.lua") for key in keys
        }
        line = suggest_word([*section.split(".")[:-1], word])
        assert any(line.startswith(f" Did you mean '{key}'?") for key in keys), word


@pytest.mark.parametrize(
    ("dotted", "key", "hint"),
    [
        ("adapters.lora.r", "adapters.lora.rank", ""),
        ("training.r", "adapters.NAME.rank", ""),
        ("adapters.lora.lora_rank", "adapters.lora.rank", ""),
        ("adapters.lora.lora_alpha", "adapters.lora.alpha", "alpha / rank"),
        ("adapters.lora.lora_dropout", "adapters.lora.dropout", ""),
        ("adapters.lora.target_module", "adapters.lora.target_modules", "all-linear"),
        ("adapters.lora.use_rslora", "adapters.lora.rslora", "true or false"),
        ("adapters.lora.learning_rate", "adapters.lora.lr", ""),
        ("training.learning_rate", "adapters.NAME.lr", "Every adapter has its own"),
        ("learning_rate", "adapters.NAME.lr", ""),
        ("lr", "adapters.NAME.lr", ""),
        ("adapters.lora.warmup", "adapters.lora.warmup_ratio", "share"),
        ("training.warmup_ratio", "adapters.NAME.warmup_ratio", ""),
        ("training.lr_scheduler_type", "adapters.NAME.lr_schedule", "constant, linear or cosine"),
        ("adapters.lora.schedule", "adapters.lora.lr_schedule", "constant, linear or cosine"),
        ("adapters.lora.within", "adapters.lora.parent_module", ""),
        ("adapters.lora.start_from", "adapters.lora.init_from", ""),
        ("adapters.lora.steps", "adapters.lora.max_steps", ""),
        ("training.epochs", "training.steps", "There are no epochs"),
        ("training.num_train_epochs", "training.steps", "There are no epochs"),
        ("epochs", "training.steps", "There are no epochs"),
        ("training.max_steps", "training.steps", ""),
        ("training.batch_size", "training.tokens_per_step", "tokens"),
        ("batch_size", "training.tokens_per_step", "tokens"),
        ("evaluation.batch_size", "evaluation.batch_rows", ""),
        ("training.per_device_train_batch_size", "training.tokens_per_microbatch", "tokens"),
        ("training.micro_batch_size", "training.tokens_per_microbatch", "tokens"),
        ("training.gradient_accumulation_steps", "training.tokens_per_microbatch", "accumulated"),
        ("training.max_seq_length", "training.max_length", ""),
        ("tasks.lua.seq_len", "training.max_length", ""),
        ("training.logging_steps", "training.log_every", ""),
        ("training.save_steps", "training.save_every", ""),
        ("training.checkpoint_every", "training.save_every", ""),
        ("training.eval_steps", "evaluation.interval", ""),
        ("evaluation.eval_steps", "evaluation.interval", ""),
        ("evaluation.every", "evaluation.interval", ""),
        ("evaluation.n", "evaluation.num_samples", ""),
        ("evaluation.k", "evaluation.pass_at_k", "[1, 10]"),
        ("evaluation.played_clips", "evaluation.embedded_clips", ""),
        ("training.bf16", "model.dtype", "bfloat16"),
        ("training.fp16", "model.dtype", "float16 is not supported"),
        ("model.model_name_or_path", "model.path", ""),
        ("model_name_or_path", "model.path", ""),
        ("model.load_in_4bit", "model.quantization", "4bit"),
        ("model.sharded", "model.fsdp", ""),
        ("dataset", "tasks.NAME.train", ""),
        ("tasks.lua.dataset", "tasks.lua.train", ""),
        ("tasks.lua.over_long", "tasks.lua.truncation", "truncate, split or drop"),
        ("output", "output_dir", ""),
        ("existing_run", "overwrite", "true (formerly replace) or false (formerly refuse)"),
        ("guard.spike", "guard.spike_factor", ""),
        ("training.Log-Every", "training.log_every", ""),
        ("training.learning_rte", "adapters.NAME.lr", ""),
        ("training.seed", "seed", ""),
        ("tasks.lua.max_length", "training.max_length", ""),
        ("training.gradient_checkpointing", "model.gradient_checkpointing", ""),
    ],
)
def test_word_of_another_trainer_names_the_full_key_and_what_to_write(
    dotted: str, key: str, hint: str
) -> None:
    line = suggested(dotted)
    assert f"Did you mean '{key}'?" in line
    assert hint in line


@pytest.mark.parametrize("split", ["train", "validation"])
def test_source_keys_name_the_source_they_stand_in(split: str) -> None:
    found = faults(**{f"tasks__lua__{split}": {"files": "a.jsonl", "stand_in": "x"}})
    assert f"Did you mean 'tasks.lua.{split}.fallback_hint'?" in found[f"tasks.lua.{split}.stand_in"]


def test_key_of_an_adapter_without_its_name_is_suggested() -> None:
    assert "Did you mean 'adapters.NAME.lr'?" in suggested("adapters.learning_rate")
    assert "Did you mean 'adapters.NAME.rank'?" in suggested("adapters.rank")
    assert "Did you mean 'tasks.NAME.weight'?" in suggested("tasks.weight")


def test_flag_of_another_trainer_is_answered_with_the_key_to_write() -> None:
    assert loading_faults("recipe=quickstart", "--learning_rate", "1e-4") == [
        "--learning_rate 1e-4: options are written key=value: adapters.NAME.lr=1e-4"
    ]
    assert loading_faults("recipe=quickstart", "--batch-size=8") == [
        "--batch-size=8: options are written key=value: training.tokens_per_step=8"
    ]
