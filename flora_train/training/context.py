"""TrainingContext: the loaded model, adapters and data that a Trainer works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.config.schema import RunConfig
from flora_train.data.batch import Collate
from flora_train.data.batch import collate as collate_text
from flora_train.data.task import Task
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.references import References
from flora_train.training.selection import Selection


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """Everything that training needs, loaded. RunContext extends it with what other stages need."""

    config: RunConfig
    folder: RunFolder
    tasks: Mapping[str, Task]
    model: nn.Module
    bank: AdapterBank
    pad_token: int
    collate: Collate = collate_text
    """Makes the batches of the run's tasks."""
    references: References = field(default_factory=References)
    """Of preferences, where they are computed before training."""
    selections: Mapping[str, Selection] = field(default_factory=dict)
    """Task -> the figure that its best states are selected by, of tasks for which that is not the loss."""
    base_hash: str | None = None
    """Fingerprint of the base model, where it is sharded; elsewhere it is computed when it is needed."""
