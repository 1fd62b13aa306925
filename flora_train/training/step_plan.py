"""The rows of a step: every drawn example, once for each adapter that learns from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import RowDraw
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.data.batch import Row, group_by_length
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.labels.split import LabelSplit
from flora_train.data.mixture import Draw, Stream, TaskMixture
from flora_train.data.preferences.costs import row_costs
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.training.label_loss import label_weight
from flora_train.training.preference_rows import DrawRows, heldout_preference_rows


@dataclass(frozen=True)
class StepPlan:
    """A step of the whole run. Every process makes the same plan, so that they need not exchange it."""

    microbatches: tuple[tuple[Row, ...], ...]
    label_tokens: Mapping[int, float]
    """Adapter id -> its label tokens in the whole step, of rows with a gradient; of labelled texts, the sum
    of their weights (see `label_weight`)."""
    tokens: int
    """Tokens of all rows."""
    task_tokens: Mapping[str, int]
    """Task -> tokens drawn from it, counted once whatever the number of adapters that learn from them."""
    preferences: Mapping[int, int] = field(default_factory=dict)
    """Adapter id -> pairs, or labelled completions, that it learns a preference from in the whole step."""
    chosen_tokens: Mapping[int, int] = field(default_factory=dict)
    """Adapter id -> label tokens of the chosen completions of these pairs."""
    texts: Mapping[int, int] = field(default_factory=dict)
    """Adapter id -> pairs or triplets of texts that it learns embeddings from in the whole step."""
    draws: Mapping[int, int] = field(default_factory=dict)
    """Adapter id -> draws that the load of its router is balanced over in the whole step, for adapters with
    balance_loss: draws of examples, or pairs where a loss couples these."""

    def draw_of(self, row: Row) -> RowDraw | None:
        """The draw that a row's router is balanced over."""
        if row.adapter not in self.draws:
            return None
        number = row.draw if row.unit is None else row.unit
        assert number is not None
        return RowDraw(number, 1.0 / self.draws[row.adapter])


def make_mixture(
    tasks: Mapping[str, Task],
    specs: Sequence[AdapterSpec],
    config: RunConfig,
    left: Mapping[str, int] | None = None,
    joined: Mapping[str, int] | None = None,
) -> TaskMixture:
    """The mixture over the tasks that have adapters. left: adapter name -> the first step without it; joined:
    task -> the first step with it (default 0); each has training.steps from there.
    """
    specs_of: dict[str, list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        specs_of[spec.task].append(spec)
    streams = []
    for task in tasks.values():
        learners = specs_of.get(task.name)
        if learners is None:
            continue
        limits = {spec.name: spec.max_steps for spec in learners}
        begins = (joined or {}).get(task.name, 0)
        ends = begins + config.training.steps
        costs = row_costs(task.train, task.preference, _cached(task, learners))
        streams.append(
            Stream(task.name, costs.lengths, task.weight, limits, begins, ends, shared=costs.shared)
        )
    return TaskMixture(streams, config.mixture, config.training.tokens_per_step, config.seed, left)


def _cached(task: Task, learners: Sequence[AdapterSpec]) -> list[bool]:
    """Of each adapter of a task, whether its reference was computed before training."""
    if task.preference is None:
        return [False] * len(learners)
    return [task.preference.reads_cache(spec.init_from is not None) for spec in learners]


def plan_step(
    mixture: TaskMixture, number: int, tasks: Mapping[str, Task], bank: AdapterBank, max_tokens: int
) -> StepPlan | None:
    """Step `number` (from 0), or None when every adapter has left."""
    return plan_draws(
        mixture.step(number), tasks, bank, number=number, seed=mixture.seed, max_tokens=max_tokens
    )


def plan_draws(
    draws: Iterable[Draw],
    tasks: Mapping[str, Task],
    bank: AdapterBank,
    *,
    number: int,
    seed: int,
    max_tokens: int,
) -> StepPlan | None:
    """A step of these draws, or None without rows. number, seed: what the noise of its inputs depends on;
    max_tokens: padded tokens of a micro-batch."""
    rows = _StepRows(seed, number, bank)
    for draw in draws:
        task = tasks[draw.task]
        if task.embedding is not None:
            rows.add_embeddings(draw, task)
        elif task.preference is None:
            rows.add_texts(draw, task.train)
        else:
            rows.add_preferences(draw, task)
    if not rows.rows:
        return None
    return StepPlan(
        microbatches=tuple(map(tuple, group_by_length(rows.rows, max_tokens))),
        label_tokens=dict(rows.label_tokens),
        tokens=sum(row.length for row in rows.rows),
        task_tokens=dict(rows.task_tokens),
        preferences=dict(rows.preferences),
        chosen_tokens=dict(rows.chosen_tokens),
        texts=dict(rows.texts),
        draws=rows.draws(),
    )


class _StepRows:
    """The rows of a step and their counts, added draw by draw."""

    def __init__(self, seed: int, number: int, bank: AdapterBank) -> None:
        self.seed, self.number, self.bank = seed, number, bank
        self.rows: list[Row] = []
        self.label_tokens: dict[int, float] = defaultdict(int)
        self.task_tokens: dict[str, int] = defaultdict(int)
        self.preferences: dict[int, int] = defaultdict(int)
        self.chosen_tokens: dict[int, int] = defaultdict(int)
        self.texts: dict[int, int] = defaultdict(int)
        self._units = 0
        self._draws = 0

    def draws(self) -> dict[int, int]:
        """The draws of each adapter whose router is balanced."""
        numbers: dict[int, set[int | None]] = defaultdict(set)
        for row in self.rows:
            if not row.frozen and self._is_balanced(row.adapter):
                numbers[row.adapter].add(row.draw if row.unit is None else row.unit)
        return {adapter: len(of_adapter) for adapter, of_adapter in numbers.items()}

    def _is_balanced(self, adapter: int) -> bool:
        experts = self.bank.specs[adapter].experts
        return experts is not None and experts.balance_loss > 0

    def add_texts(self, draw: Draw, split: TokenSplit) -> None:
        number = self._draws
        self._draws += 1
        for example in draw.examples:
            length, window = split.length(example), split.window(example)
            self.task_tokens[draw.task] += length
            seed = None
            if window:
                seed = seed_of(self.seed, f"augment {self.number}", draw.task, str(example))
            label_tokens: float = split.label_count(example)
            if isinstance(split, LabelSplit):
                label_tokens = label_weight(split, example)
            for name in draw.adapters:
                adapter = self.bank.ids[name]
                shares = self.bank.shares_encoding(adapter)
                balanced = number if self._is_balanced(adapter) else None
                row = Row(adapter, draw.task, example, length, window, shares, seed, draw=balanced)
                self.rows.append(row)
                self.label_tokens[adapter] += label_tokens

    def add_preferences(self, draw: Draw, task: Task) -> None:
        split, preference = task.train, task.preference
        assert preference is not None
        assert isinstance(split, PreferenceSplit)
        maker = DrawRows(draw.task, preference, split)
        in_batch: list[int] = []
        cached: list[int] = []
        for name in draw.adapters:
            adapter = self.bank.ids[name]
            reads_cache = preference.reads_cache(self.bank.specs[adapter].init_from is not None)
            group = cached if reads_cache else in_batch
            group.append(adapter)
        made = list(maker.rows(draw.examples, in_batch, cached=cached, first_unit=self._units))
        self._units += maker.units(len(draw.examples))
        self.rows += made
        self.task_tokens[draw.task] += sum(
            split.size(example, document)
            for example in draw.examples
            for document in range(1 + split.is_paired)
        )
        for row in made:
            if row.frozen:
                continue
            learnt = split.learnt(row.example, row.document)
            self.label_tokens[row.adapter] += learnt
            if row.unit is not None and row.document == 0:
                self.preferences[row.adapter] += 1
                self.chosen_tokens[row.adapter] += learnt

    def add_embeddings(self, draw: Draw, task: Task) -> None:
        """The texts of a draw, which the loss couples: for each adapter they are one unit."""
        split = task.train
        assert isinstance(split, EmbeddingSplit)
        unit = self._units
        self._units += 1
        sizes = [(i, part, split.size(i, part)) for i in draw.examples for part in range(split.spec.texts)]
        self.task_tokens[draw.task] += sum(size for _, _, size in sizes)
        for name in draw.adapters:
            adapter = self.bank.ids[name]
            for example, document, size in sizes:
                self.rows.append(Row(adapter, draw.task, example, size, document=document, unit=unit))
            self.label_tokens[adapter] += 0  # it takes part in the step
            self.texts[adapter] += len(draw.examples)


def heldout_rows(
    bank: AdapterBank,
    adapters: Sequence[int],
    task: str,
    split: TokenSplit,
    max_examples: int | None = None,
    *,
    preference: Preference | None = None,
) -> list[Row]:
    """The first held-out examples of a task for every one of these adapters (-1: the base model)."""
    if preference is not None and isinstance(split, PreferenceSplit):
        examples = len(split) if max_examples is None else min(len(split), max_examples)
        return heldout_preference_rows(task, preference, split, adapters, examples)
    if isinstance(split, EmbeddingSplit):
        return [
            Row(adapter, task, i, split.size(i, document), document=document)
            for i in range(len(split))[:max_examples]
            for document in range(split.spec.texts)
            for adapter in adapters
        ]
    return [
        Row(adapter, task, i, int(length), split.window(i), bank.shares_encoding(adapter))
        for i, length in enumerate(split.lengths[:max_examples])
        for adapter in adapters
    ]
