"""Train many task-specific adapters at once on one frozen base model, each as good as if trained alone.

What the command line does, in Python: `load_config`, `train`, `evaluate`, `export_adapters`; `read_metrics`
gives a DataFrame. For training loops of your own: `AdapterBank`, `AdapterConfig`, `make_spec`,
`BankOptimizer`, `TorchBankOptimizer`. docs/python.md has an example of each.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora_train.adapters.bank import AdapterBank
    from flora_train.adapters.spec import make_spec
    from flora_train.commands.evaluate import evaluate_run as evaluate
    from flora_train.commands.export import export_adapters
    from flora_train.commands.train import train_run as train
    from flora_train.config.adapter_schema import AdapterConfig
    from flora_train.config.errors import UserError
    from flora_train.config.load import load_config
    from flora_train.config.training_schema import TrainingConfig
    from flora_train.runtime.logging import init_logging
    from flora_train.training.metrics_table import read_metrics
    from flora_train.training.optimizer import BankOptimizer, TorchBankOptimizer

__version__ = "0.1.0"
logging.getLogger(__name__).addHandler(logging.NullHandler())
__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "BankOptimizer",
    "TorchBankOptimizer",
    "TrainingConfig",
    "UserError",
    "evaluate",
    "export_adapters",
    "init_logging",
    "load_config",
    "make_spec",
    "read_metrics",
    "train",
]

HOMES = {
    "AdapterBank": "flora_train.adapters.bank",
    "AdapterConfig": "flora_train.config.schema",
    "BankOptimizer": "flora_train.training.optimizer",
    "TorchBankOptimizer": "flora_train.training.optimizer",
    "TrainingConfig": "flora_train.config.training_schema",
    "UserError": "flora_train.config.errors",
    "evaluate": "flora_train.commands.evaluate:evaluate_run",
    "export_adapters": "flora_train.commands.export",
    "init_logging": "flora_train.runtime.logging",
    "load_config": "flora_train.config.load",
    "make_spec": "flora_train.adapters.spec",
    "read_metrics": "flora_train.training.metrics_table",
    "train": "flora_train.commands.train:train_run",
}
"""Name -> module and name in it. torch is loaded only when a name that needs it is used."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = HOMES[name].partition(":")
    return getattr(import_module(module), original or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
