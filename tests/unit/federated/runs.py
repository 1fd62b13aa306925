"""Small federated runs on a tiny encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.federated.loaded import LoadedRun, load_federated
from flora_train.runtime.run_folder import RunFolder
from tests.encoders import labelled_rows, save_encoder, write_rows

CONSTANT = {"lr_schedule": "constant"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2, "lr": 2e-2, **CONSTANT},
    "flora": {"method": "flora", "rank": 2, "lr": 2e-2, **CONSTANT},
    "ia3": {"method": "ia3", "lr": 2e-2, **CONSTANT},
    "full": {"method": "head", "lr": 1e-3, "head_lr": 1e-2, **CONSTANT},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "usual": {"adapter": "lora", "algorithm": "factor_mean"},
    "products": {"adapter": "lora"},
    "fedex": {"adapter": "lora", "algorithm": "fedex"},
    "slora": {"adapter": "lora", "algorithm": "slora", "sparse_rounds": 1, "density": 0.1},
    "sflora": {"adapter": "flora", "algorithm": "slora", "sparse_rounds": 2, "sparse_lr": 1e-2},
    "flora": {"adapter": "flora"},
    "ia3": {"adapter": "ia3"},
    "full": {"adapter": "full", "algorithm": "full"},
    "central": {"adapter": "lora", "central": True},
    "central_full": {"adapter": "full", "algorithm": "full", "central": True},
}


def raw_config(folder: Path, strategies: list[str], **federated: Any) -> dict[str, Any]:
    """A run of these strategies: 4 clients of 48 texts with two labels, 3 rounds of 2 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():
        save_encoder(base)
    chosen = {name: dict(STRATEGIES[name]) for name in strategies}
    used = {own["adapter"] for own in chosen.values()}
    return {
        "name": "clients",
        "num_threads": 1,
        "output_dir": str(folder / "run"),
        "model": {"path": str(base), "dtype": "float32"},
        "tasks": {
            "kind": {
                "train": write_rows(folder / "train.jsonl", labelled_rows(48)),
                "validation": write_rows(folder / "held.jsonl", labelled_rows(24, seed=1)),
                "text": "text",
                "label": "kind",
            }
        },
        "adapters": {name: dict(ADAPTERS[name]) for name in ADAPTERS if name in used},
        "training": {"steps": 2, "tokens_per_microbatch": 400, "max_length": 32},
        "evaluation": {"bootstrap_samples": 100},
        "federated": {
            "rounds": 3,
            "num_clients": 4,
            "dirichlet_alpha": 1.0,
            "batch_examples": 4,
            "strategies": chosen,
            **federated,
        },
    }


def load_small(folder: Path, strategies: list[str], **federated: Any) -> LoadedRun:
    """A loaded run of `raw_config`."""
    return load(validate(raw_config(folder, strategies, **federated)))


def load(config: RunConfig) -> LoadedRun:
    """Data and base of a run."""
    return load_federated(config, RunFolder(Path(config.folder)), torch.device("cpu"))
