"""The isolation guarantees on speech: windows, shared encodings, cross-attention, dropout and SpecAugment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.load import validate
from flora_train.data.audio.collate import SpeechCollate
from flora_train.data.task import load_tasks
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.step_plan import StepPlan, plan_step
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.other_speech import KINDS, loaded_tiny, speech_processor_of
from tests.speech import loaded_tiny_whisper, tiny_speech_processor, write_corpus
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
        replace(spec("flora", "hi", "decoder", rank=2, **options), parent_module="decoder"),
        spec("lora", "en", "lora", rank=2, dropout=0.2, **options),
        replace(spec("lora", "cs", "lora_decoder", rank=2, dropout=0.2, **options), parent_module="decoder"),
        spec("ia3", "hi", "ia3", **options),
    ]


def base_of(kind: str) -> Any:
    return loaded_tiny_whisper() if kind == "whisper" else loaded_tiny(kind)


def trainer_of(
    specs: Sequence[AdapterSpec],
    corpus: Path,
    folder: Path,
    checkpointing: str = "off",
    kind: str = "whisper",
    **training: Any,
) -> Trainer:
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
            "audio": {"window_step": 0.5},
            "training": {
                "steps": 12,
                "max_length": 40,
                "tokens_per_step": 700,
                "tokens_per_microbatch": 700,
                **training,
            },
        }
    )
    speech_processor = (
        tiny_speech_processor(corpus, window_step=0.5)
        if kind == "whisper"
        else speech_processor_of(kind, corpus, window_step=0.5)
    )
    model = base_of(kind)
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    bank = AdapterBank.attach(model, specs)
    found = load_tasks(config, speech_processor.tokenizer, corpus / "tokens", speech_processor)
    pad = int(speech_processor.tokenizer.pad_token_id)
    return Trainer(
        TrainingContext(
            config=config,
            folder=RunFolder(folder),
            tasks=found,
            model=model,
            bank=bank,
            pad_token=pad,
            collate=SpeechCollate(speech_processor.store, spec_augment=kind == "whisper"),
        )
    )


def plans_of(trainer: Trainer, steps: int = 12) -> list[StepPlan]:
    found = [
        plan_step(
            trainer.mixture, n, trainer.tasks, trainer.bank, trainer.config.training.tokens_per_microbatch
        )
        for n in range(steps)
    ]
    return [plan for plan in found if plan is not None]


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        pytest.param("sgd", {}, id="sgd"),
        pytest.param("adamw", {}, id="adamw"),
        pytest.param("sgd", {"tokens_per_microbatch": 250}, id="sgd, accumulation"),
        pytest.param("adamw", {"tokens_per_microbatch": 250}, id="adamw, accumulation"),
        pytest.param("adamw", {"checkpointing": "reentrant"}, id="adamw, reentrant checkpointing"),
        pytest.param("sgd", {"kind": "moonshine"}, id="sgd, moonshine"),
        pytest.param("sgd", {"kind": "speech_to_text"}, id="sgd, speech_to_text"),
    ],
)
@pytest.mark.quick("adamw, accumulation", "sgd, moonshine")
def test_trained_together_equals_trained_alone(
    optimizer: str, options: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
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


def test_absent_adapters_are_bitwise_unchanged(corpus: Path, tmp_path: Path) -> None:
    together = trainer_of(specs_of(lr=2e-3, weight_decay=0.1), corpus, tmp_path)
    for number, plan in enumerate(plans_of(together)):
        before = snapshot(together)
        together.step(number, plan)
        after = snapshot(together)
        for name, adapter in together.bank.ids.items():
            same = all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
            assert same == (adapter not in plan.label_tokens), name


def test_nan_in_one_adapter_changes_no_bit_of_the_others(corpus: Path, tmp_path: Path) -> None:
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
            assert all(torch.equal(a, b) for a, b in zip(results[0][name], results[1][name], strict=True)), (
                name
            )


@pytest.mark.parametrize("kind", ["whisper", *KINDS])
def test_lora_in_the_mix_equals_pefts_own_loop_on_the_same_batches(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    """PEFT's LoRA on transformers' own model, its cross entropy, torch's SGD (AdamW would blow rounding up):
    no code of ours but the batches."""
    specs = [
        spec("lora", "en", "lora", rank=2, lr=0.05, max_grad_norm=None),
        spec("flora", "cs", lr=2e-3),
        spec("ia3", "hi", lr=2e-3),
    ]
    together = trainer_of(specs, corpus, tmp_path, kind=kind, optimizer="sgd")
    adapter = together.bank.ids["en-lora"]
    start = {
        name: {p: t.clone() for p, t in params.items()}
        for name, params in together.bank.parameters_of("en-lora").items()
    }
    plans = plans_of(together)
    train_together(together, plans)

    model = get_peft_model(
        base_of(kind),
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "fc1", "fc2"],
        ),
    )
    modules = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for name, params in start.items():
            modules[name].lora_A["default"].weight.copy_(params["A"])
            modules[name].lora_B["default"].weight.copy_(params["B"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    steps = 0
    for plan in plans:
        if (part := only(plan, adapter)) is None:
            continue
        total = torch.zeros(())
        for rows in part.microbatches:
            batch = together.make_batch(rows)
            name = model.base_model.model.main_input_name
            logits = model(**{**batch.inputs, name: batch.inputs[name][batch.clips]}).logits
            total = total + torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), batch.labels, reduction="sum"
            )
        (total / part.label_tokens[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    assert steps > 5
    for name, params in together.bank.parameters_of("en-lora").items():
        for param, letter in (("A", "lora_A"), ("B", "lora_B")):
            theirs = getattr(modules[name], letter)["default"].weight
            torch.testing.assert_close(params[param], theirs, rtol=0, atol=1e-5)
    assert (
        max(float(params["B"].abs().max()) for params in together.bank.parameters_of("en-lora").values())
        > 1e-2
    )
