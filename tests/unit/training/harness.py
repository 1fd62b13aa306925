"""A Trainer on a tiny model and random tokens, and the same adapter trained alone on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import BASE_ID, AdapterSpec, head_shape
from flora_train.config.load import validate
from flora_train.config.sweep import SweepConfig
from flora_train.data.batch import IGNORE, MixedBatch, Row, collate
from flora_train.data.documents import EncodedDocument, EncodedExample
from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.data.embeddings.split import EmbeddingSplit, embedding_split
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.split import LabelSplit, label_split
from flora_train.data.packing import pack
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit, preference_split
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.task import Task
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.step_plan import StepPlan, plan_step
from flora_train.training.trainer import Trainer
from tests.architectures import VOCABULARY, features_of, tiny_model
from tests.unit.adapters.gate_reference import randomise

PAD = 0


def random_split(seed: int, examples: int, least_prompt: int = 0, longest: int = 14) -> TokenSplit:
    """Examples of 4 to `longest` random tokens, some with a prompt."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, longest + 1, examples)
    return TokenSplit(
        tokens=generator.integers(2, VOCABULARY, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        **spans_after(generator.integers(least_prompt, 3, examples), lengths),
        label_bytes=lengths.astype(np.int64),
        pack_offsets=np.arange(examples + 1),
        counts=SplitCounts(rows=examples, examples=examples, tokens=int(lengths.sum())),
    )


def random_preferences(
    seed: int, examples: int, objective: str, limit: int = 16, *, shared: int = 3
) -> PreferenceSplit:
    """Pairs whose completions continue the same prompt of 1 to `shared` tokens, or labelled completions."""
    generator = np.random.default_rng(seed)
    builder = SplitBuilder()
    completions = 1 if objective == "kto" else 2
    for number in range(examples):
        prompt = generator.integers(2, VOCABULARY, generator.integers(1, shared + 1))
        documents = []
        for _ in range(completions):
            completion = generator.integers(2, VOCABULARY, generator.integers(2, limit - shared + 1))
            tokens = np.concatenate([prompt, completion]).astype(np.int32)
            documents.append(EncodedDocument(tokens, [(len(prompt), len(tokens))], len(completion)))
        label = None
        if objective == "kto":
            label = number % 3 > 0
        builder.add(EncodedExample(tuple(documents), "whole", label=label))
    return preference_split(builder.split(), limit)


def random_embeddings(seed: int, examples: int, spec: EmbeddingSpec, longest: int = 9) -> EmbeddingSplit:
    """Pairs or triplets of 3 to `longest` random tokens. Every fourth positive is that of the pair before."""
    generator = np.random.default_rng(seed)
    builder = SplitBuilder()
    positive = np.zeros(0, dtype=np.int32)
    for number in range(examples):
        texts = [
            generator.integers(2, VOCABULARY, generator.integers(3, longest + 1)).astype(np.int32)
            for _ in range(spec.texts)
        ]
        if number % 4 == 3:
            texts[1] = positive
        positive = texts[1]
        documents = tuple(EncodedDocument(text, (), 0) for text in texts)
        builder.add(EncodedExample(documents, "whole"))
    return embedding_split(builder.split(), spec)


def random_chats(seed: int, examples: int, longest: int = 16) -> TokenSplit:
    """Examples of random tokens of which several spans are learnt."""
    generator = np.random.default_rng(seed)
    builder = SplitBuilder()
    for _ in range(examples):
        length = int(generator.integers(6, longest + 1))
        begins = np.sort(generator.choice(np.arange(1, length - 1, 2), 2, replace=False))
        spans = [(int(begin), int(begin) + 1) for begin in begins]
        tokens = generator.integers(2, VOCABULARY, length).astype(np.int32)
        builder.add(EncodedExample((EncodedDocument(tokens, spans, 2),), "whole"))
    return builder.split()


def random_labels(seed: int, examples: int, label: LabelSpec, longest: int = 14) -> LabelSplit:
    """Texts of 4 to `longest` random tokens with random labels."""
    generator = np.random.default_rng(seed)
    builder = SplitBuilder()
    for _ in range(examples):
        tokens = generator.integers(3, VOCABULARY, generator.integers(4, longest + 1)).astype(np.int32)
        target: Any = (float(generator.normal()),)
        if label.task_type == "single":
            target = (float(generator.integers(len(label.labels))),)
        elif label.task_type == "multi":
            target = tuple(generator.integers(0, 2, len(label.labels)).astype(float))
        elif label.task_type == "tokens":
            values = generator.integers(len(label.labels), size=len(tokens)).astype(float)
            values[0] = values[-1] = IGNORE
            target = tuple(values)
        builder.add(EncodedExample((EncodedDocument(tokens, (), 0),), "whole", target=target))
    return label_split(builder.split(), label)


def make_trainer(
    specs: Sequence[AdapterSpec],
    folder: Path,
    architecture: str = "llama",
    checkpointing: str = "off",
    device: str = "cpu",
    interval: int | None = None,
    sweep: str = "all",
    guard: dict[str, Any] | None = None,
    paging: Paging | None = None,
    dtype: torch.dtype = torch.float32,
    preferences: Mapping[str, Preference] | None = None,
    embeddings: Mapping[str, EmbeddingSpec] | None = None,
    examples_per_draw: int = 1,
    chats: Sequence[str] = (),
    packed_chats: Sequence[str] = (),
    labels: Mapping[str, LabelSpec] | None = None,
    members: Mapping[str, Sequence[str]] | None = None,
    **training: Any,
) -> Trainer:
    """A trainer for `specs` on tasks a, b and c; same arguments, same trainer.

    preferences, embeddings: of the tasks that are not plain text; chats, packed_chats: tasks of
    conversations; labels: of the tasks of labelled texts, which may have other names; members: of the tasks
    whose rows belong to a member of a gate. Gates and their members have random values.
    """
    labels = labels or {}
    specs = [replace(s, head=head_shape(labels[s.task])) if s.task in labels else s for s in specs]
    source = {"train": "unused.jsonl"}
    config = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": dict.fromkeys((*"abc", *(labels or {})), source),
            "adapters": {"unused": {"method": "ia3", "lr": 1e-3}},
            "mixture": {"strategy": "uniform", "examples_per_draw": examples_per_draw},
            "training": {
                "steps": 20,
                "tokens_per_step": 90,
                "tokens_per_microbatch": 4096,
                "max_length": 16,
                **training,
            },
            "evaluation": {"interval": interval},
            "guard": guard or {},
        }
    )
    model: Any = tiny_model(architecture, dtype).to(device)
    encoder_decoder = model.config.is_encoder_decoder
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    least = int(encoder_decoder)  # an encoder must get something to read
    splits = {
        name: (random_split(i, 40, least), random_split(10 + i, 6, least)) for i, name in enumerate("abc")
    }
    for i, name in enumerate((*chats, *packed_chats)):
        splits[name] = random_chats(40 + i, 40), random_chats(50 + i, 6)
    for name in packed_chats:
        splits[name] = pack(splits[name][0], 40), splits[name][1]
    for name, names in (members or {}).items():
        splits[name] = with_members(splits[name][0], len(names)), splits[name][1]
    tasks = {
        name: Task(name, 1.0, *halves, "", members=tuple((members or {}).get(name, ())))
        for name, halves in splits.items()
    }
    for number, (name, preference) in enumerate((preferences or {}).items()):
        halves = (random_preferences(20 + 2 * number + i, (24, 5)[i], preference.objective) for i in (0, 1))
        tasks[name] = Task(name, 1.0, *halves, "", preference=preference)
    for number, (name, label) in enumerate(labels.items()):
        halves = (random_labels(60 + 2 * number + i, (40, 7)[i], label) for i in (0, 1))
        tasks[name] = Task(name, 1.0, *halves, "", label=label)
    for number, (name, embedding) in enumerate((embeddings or {}).items()):
        pairs = (random_embeddings(60 + 2 * number + i, (24, 7)[i], embedding) for i in (0, 1))
        tasks[name] = Task(name, 1.0, *pairs, "", embedding=embedding)
    bank = AdapterBank.attach(model, specs, paging=paging)
    randomise(bank)
    config = config.model_copy(
        update={"sweep": SweepConfig.model_validate({"strategy": sweep})}
    )  # the specs are the adapters here
    make_batch = partial(collate_pairs, model.config) if encoder_decoder else collate
    return Trainer(
        TrainingContext(
            config=config,
            folder=RunFolder(folder),
            tasks=tasks,
            model=model,
            bank=bank,
            pad_token=PAD,
            collate=make_batch,
        )
    )


def with_members(split: TokenSplit, members: int) -> TokenSplit:
    """The same documents, each of which belongs to one of so many members."""
    documents = len(split.offsets) - 1
    targets = np.random.default_rng(documents).integers(0, members, documents).astype(np.float64)
    return replace(split, targets=targets, target_offsets=np.arange(documents + 1))


def collate_pairs(
    config: Any, rows: Sequence[Row], split_of: Callable[[str], TokenSplit], pad_token: int
) -> MixedBatch:
    """Rows -> a batch of an encoder-decoder: its encoder reads the prompt (Whisper's: features), its decoder
    learns the rest."""

    def padded(parts: list[np.ndarray], fill: int) -> torch.Tensor:
        return pad_sequence(
            [torch.from_numpy(part.astype(np.int64)) for part in parts], batch_first=True, padding_value=fill
        )

    found = [
        (split_of(row.task).example(row.example), int(split_of(row.task).learnt_spans(row.example)[0, 0]))
        for row in rows
    ]
    read, mask = (
        padded([np.ones_like(e[:n]) if ones else e[:n] for e, n in found], 0) for ones in (False, True)
    )
    labels = padded([example[n:] for example, n in found], IGNORE)
    decoder = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORE, pad_token)
    decoder[:, 0] = config.decoder_start_token_id
    inputs = {"decoder_input_ids": decoder}
    if config.model_type == "whisper":
        inputs["input_features"] = torch.cat(
            [features_of(part[None, :n]) for part, n in zip(read, mask.sum(1), strict=True)]
        )
    else:
        inputs |= {"input_ids": read, "attention_mask": mask}
    return MixedBatch(inputs, labels, torch.tensor([row.adapter for row in rows]), tuple(rows))


def plans_of(trainer: Trainer, steps: int = 20) -> list[StepPlan]:
    plans = [
        plan_step(
            trainer.mixture, n, trainer.tasks, trainer.bank, trainer.config.training.tokens_per_microbatch
        )
        for n in range(steps)
    ]
    return [plan for plan in plans if plan is not None]


def only(plan: StepPlan, adapter: int) -> StepPlan | None:
    """The part of a plan that concerns one adapter, whose id becomes 0; None if it is absent."""
    if adapter not in plan.label_tokens:
        return None
    groups = []
    for group in plan.microbatches:
        units = {(row.task, row.unit) for row in group if row.adapter == adapter and row.unit is not None}
        rows = [
            row
            for row in group
            if row.adapter == adapter or (row.adapter == BASE_ID and (row.task, row.unit) in units)
        ]
        groups.append(tuple(replace(row, adapter=0 if row.adapter == adapter else BASE_ID) for row in rows))
    return replace(
        plan,
        microbatches=tuple(filter(None, groups)),
        label_tokens={0: plan.label_tokens[adapter]},
        preferences=_of_first(plan.preferences, adapter),
        chosen_tokens=_of_first(plan.chosen_tokens, adapter),
        texts=_of_first(plan.texts, adapter),
        draws=_of_first(plan.draws, adapter),
    )


def _of_first(counts: Mapping[int, int], adapter: int) -> dict[int, int]:
    """The count of one adapter, whose id becomes 0."""
    if adapter in counts:
        return {0: counts[adapter]}
    return {}


def train_together(trainer: Trainer, plans: Sequence[StepPlan]) -> None:
    for number, plan in enumerate(plans):
        trainer.step(number, plan)


def largest_difference_to_training_alone(
    together: Trainer, plans: Sequence[StepPlan], folder: Path, **options: Any
) -> dict[str, float]:
    """max |dW| per adapter between the trained bank and every adapter trained alone on its part of the same
    plans."""
    differences = {}
    for name, adapter in together.bank.ids.items():
        alone = make_trainer([together.bank.specs[adapter]], folder, **options)
        for number, plan in enumerate(plans):
            part = only(plan, adapter)
            if part is not None:
                alone.step(number, part)
        differences[name] = float((alone.bank.row(0) - together.bank.row(adapter)).abs().max())
    return differences


def check_isolation(
    specs: Sequence[AdapterSpec],
    folder: Path,
    *,
    architecture: str = "llama",
    least_move: float = 1e-3,
    **options: Any,
) -> list[StepPlan]:
    """Train adapters together, some of them absent in some steps, and each alone: at most 1e-5 apart, and all
    of them moved. Returns the plans of the steps."""
    together = make_trainer(specs, folder, architecture, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    train_together(together, plans)
    moves = moved(together, architecture)
    assert min(moves.values()) > least_move, moves
    differences = largest_difference_to_training_alone(
        together, plans, folder, architecture=architecture, **options
    )
    assert max(differences.values()) <= 1e-5, differences
    return plans


def moved(trainer: Trainer, architecture: str = "llama") -> dict[str, float]:
    """How far every adapter is from its start: an isolation test on adapters that stand still proves
    nothing."""
    start = AdapterBank.attach(tiny_model(architecture), trainer.bank.specs)
    return {
        name: float((start.row(i) - trainer.bank.row(i)).abs().max()) for name, i in trainer.bank.ids.items()
    }


def snapshot(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Every adapter's numbers and optimizer state, bit by bit."""
    states: dict[str, list[torch.Tensor]] = {}
    for name, adapter in trainer.bank.ids.items():
        count = torch.tensor(trainer.optimizer.steps[adapter])
        states[name] = [*(part.clone() for part in trainer.bank.state(adapter).values()), count]
    return states
