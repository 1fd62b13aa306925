"""The guarantees on speech: windows, shared encodings, cross-attention, dropout and SpecAugment change nothing in who learns what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.load import validate
from flora_train.data.audio.batch import SpeechCollate
from flora_train.data.task import load_tasks
from flora_train.training.plan import StepPlan, plan_step
from flora_train.training.run_folder import RunFolder
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.speech import loaded_tiny_whisper, tiny_ears, write_corpus
from tests.unit.training.harness import only, snapshot, train_together

LANGUAGES = ("en", "cs", "hi")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for language in LANGUAGES:
        write_corpus(folder, language)
    return folder


def specs_of(**options: Any) -> list[AdapterSpec]:
    """In encoder and decoder, only in the decoder, and with dropout."""
    return [
        spec("flora", "en", "flora", rank=2, **options),
        spec("flora", "cs", "pure", rank=2, variant="pure", **options),
        replace(spec("flora", "hi", "decoder", rank=2, **options), within="decoder"),
        spec("lora", "en", "lora", rank=2, dropout=0.2, **options),
        replace(spec("lora", "cs", "lora_decoder", rank=2, dropout=0.2, **options), within="decoder"),
        spec("ia3", "hi", "ia3", **options),
    ]


def trainer_of(specs: Sequence[AdapterSpec], corpus: Path, folder: Path, checkpointing: str = "off", **training: Any) -> Trainer:
    tasks = {
        language: {
            "speech": {"language": language},
            **{split: str(corpus / f"{language}.{split}.jsonl") for split in ("train", "validation", "test")},
        }
        for language in LANGUAGES
    }
    config = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": tasks,
            "adapters": {"unused": {"method": "ia3", "lr": 1e-3}},
            "mixture": {"strategy": "uniform"},
            "audio": {"window_step": 0.5, "spec_augment": True},
            "training": {"steps": 12, "max_length": 40, "tokens_per_step": 700, "tokens_per_microbatch": 700, **training},
        }
    )
    ears = tiny_ears(corpus, window_step=0.5)
    model = loaded_tiny_whisper()
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    bank = AdapterBank.attach(model, specs)
    accelerator = SimpleNamespace(log=lambda *args, **options: None)
    found = load_tasks(config, ears.tokenizer, corpus / "tokens", ears)
    pad = int(ears.tokenizer.pad_token_id)
    return Trainer(config, model, bank, found, pad, RunFolder(folder), accelerator, SpeechCollate(ears.store, spec_augment=True))


def plans_of(trainer: Trainer, steps: int = 12) -> list[StepPlan]:
    found = [
        plan_step(trainer.mixture, n, trainer.tasks, trainer.bank, trainer.config.training.tokens_per_microbatch)
        for n in range(steps)
    ]
    return [plan for plan in found if plan is not None]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tokens_per_microbatch": 250}, id="accumulation"),
        pytest.param({"checkpointing": "reentrant"}, id="reentrant-checkpointing"),
    ],
)
def test_trained_together_equals_trained_alone(optimizer: str, options: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    lr = {"adamw": 2e-3, "sgd": 0.05}[optimizer]
    specs = specs_of(lr=lr, max_grad_norm=0.5, weight_decay=0.1, warmup_steps=2)
    together = trainer_of(specs, corpus, tmp_path, optimizer=optimizer, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    assert len({rows[0].window for plan in plans for rows in plan.microbatches}) > 1
    assert {rows[0].shares_encoding for plan in plans for rows in plan.microbatches} == {True, False}
    start = together.bank.pools[0].values.clone()
    train_together(together, plans)
    assert (together.bank.pools[0].values - start).abs().max() > 1e-3
    for name, adapter in together.bank.ids.items():
        alone = trainer_of([together.bank.specs[adapter]], corpus, tmp_path, optimizer=optimizer, **options)
        for number, plan in enumerate(plans):
            if (part := only(plan, adapter)) is not None:
                alone.step(number, part)
        difference = float((alone.bank.row(0) - together.bank.row(adapter)).abs().max())
        assert difference < 1e-5, f"{name} differs by {difference}"


def test_absent_adapters_stay_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    together = trainer_of(specs_of(lr=2e-3, weight_decay=0.1), corpus, tmp_path)
    for number, plan in enumerate(plans_of(together)):
        before = snapshot(together)
        together.step(number, plan)
        after = snapshot(together)
        for name, adapter in together.bank.ids.items():
            same = all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
            assert same == (adapter not in plan.label_tokens), name


def test_a_nan_in_one_adapter_leaves_the_others_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    results = []
    for damage in (False, True):
        trainer = trainer_of(specs_of(lr=2e-3), corpus, tmp_path)
        plans = plans_of(trainer, 4)
        train_together(trainer, plans[:2])
        if damage:
            trainer.bank.row(trainer.bank.ids["hi-decoder"]).fill_(float("nan"))
        train_together(trainer, plans[2:])
        results.append(snapshot(trainer))
    for name in results[0]:
        if name != "hi-decoder":
            assert all(torch.equal(a, b) for a, b in zip(results[0][name], results[1][name], strict=True)), name
