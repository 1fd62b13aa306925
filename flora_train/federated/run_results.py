"""What a federated run writes into its folder, beside the states of its rounds and the report."""

from __future__ import annotations

from flora_train.data.hub_commits import commits_of
from flora_train.data.tokenization import tokenizer_hash
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.federated.loaded import LoadedRun
from flora_train.federated.run import federated_of, files_of
from flora_train.federated.stages import Stage
from flora_train.federated.strategy_run import StrategyRun
from flora_train.models.base_identity import base_identity
from flora_train.runtime.environment import dtype_of
from flora_train.training.origin import data_of

EXPORTED = ("lora", "flora", "ia3")
"""Methods whose global adapters become PEFT folders."""


def claim_folder(loaded: LoadedRun, *, with_data: bool = True) -> None:
    """Take the folder for this run, before its first round.

    Args:
        loaded: Data and base.
        with_data: Whether the examples of its tasks are known here, so that a resumed run can be checked.
    """
    config, data = loaded.config, {}
    if with_data:
        for name, task in loaded.tasks.items():
            data[name] = data_of(task).model_dump(exclude_none=True)
    loaded.folder.claim(
        config,
        files_of(federated_of(loaded)),
        base_dtype=dtype_of(loaded.model),
        base=base_identity(config.model),
        tokenizer=tokenizer_hash(loaded.tokenizer),
        hub_commits=commits_of(config),
        data=data,
    )


def is_exported(stage: Stage) -> bool:
    """Whether the global adapter of a last stage becomes a PEFT folder.

    Not if it changes no layer, or belongs to weights of the base that rounds changed.
    """
    return stage.algorithm not in ("fedex", "full") and stage.spec.method in EXPORTED


def export_global(loaded: LoadedRun, strategy: StrategyRun) -> None:
    """Write the global adapter of a strategy, after its last round, as a PEFT folder."""
    name = strategy.global_adapter
    strategy.load_global(name)
    model = loaded.config.model
    base = BaseModel(model.path, model.revision, base_identity(model))
    export_peft(strategy.trainer.bank, name, loaded.folder.adapters / name, base=base)
