"""What the gates of a row are to choose: the member that the row belongs to, at its learnt tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.gate_loss import goal_positions
from flora_train.adapters.routing import RowGoal
from flora_train.data.batch import Row
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.training.step_plan import StepPlan


class GateGoals:
    """Makes the goals of rows, for adapters whose gate has a loss."""

    def __init__(self, bank: AdapterBank, tasks: Mapping[str, Task]) -> None:
        self.bank, self.tasks = bank, tasks
        self._numbers: dict[int, list[int]] = {}
        """Adapter id -> the number in its gate of each of its task's members."""
        for adapter, spec in enumerate(bank.specs):
            if spec.gate is not None and spec.gate.loss > 0:
                names = [member.name for member in spec.gate.members]
                self._numbers[adapter] = [names.index(name) for name in tasks[spec.task].members]

    def of_row(self, row: Row, plan: StepPlan) -> RowGoal | None:
        """The goal of a training row; None for adapters without, and for rows without learnt tokens."""
        numbers = self._numbers.get(row.adapter)
        learnt = plan.label_tokens.get(row.adapter, 0)
        if numbers is None or not learnt:
            return None
        gate = self.bank.specs[row.adapter].gate
        assert gate is not None
        split = self.tasks[row.task].train
        members = [numbers[member] for member in members_of_example(split, row.example)]
        documents = [(len(tokens), spans) for tokens, spans in split.documents(row.example)]
        return RowGoal(goal_positions(documents, members), gate.loss / learnt)


def members_of_example(split: TokenSplit, example: int) -> list[int]:
    """The member of each document of an example, by its number in `Task.members`; of a task with task_id."""
    firsts = split.target_offsets[split.numbers(example)]
    return [int(member) for member in np.asarray(split.targets)[firsts]]
