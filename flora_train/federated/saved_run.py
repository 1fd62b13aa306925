"""The saved state of one strategy with one seed: one file, which is replaced as a whole after every round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonObject
from flora_train.federated.result_types import RoundResult
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.checksum import DamagedError, check_regular, damaged_file, verify, with_checksums

STATE_FILE = "state.safetensors"
ROUNDS = "rounds.json"
"""Name of the tensor that holds the results of all rounds as bytes: a header is limited to 100 MB."""
FOLDER = "federated"
"""In the run folder; it has a folder for each strategy and seed."""


@dataclass(frozen=True)
class SavedRun:
    """What a strategy needs to go on after a round, or to be reported."""

    rounds: list[RoundResult]
    tensors: Mapping[str, Tensor]
    """Values, weights of the base where it changed, and scores, with the prefixes that their writers give."""
    facts: JsonObject = field(default_factory=dict)
    """Of its server: fingerprint of the base, bytes that clients still have to get, values per client."""


def state_path(run_folder: Path, run: str) -> Path:
    """The file of a strategy and seed. run: a key of `FederatedConfig.runs`."""
    return run_folder / FOLDER / run / STATE_FILE


def write_saved(path: Path, saved: SavedRun) -> None:
    """Replace the file. Raises UserError if the disk is full; the previous one remains."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}
    rounds = [own.model_dump(mode="json") for own in saved.rounds]
    text = json.dumps(rounds, allow_nan=False).encode()
    tensors[ROUNDS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    header = with_checksums(tensors, json.dumps(saved.facts, allow_nan=False))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def read_saved(path: Path) -> SavedRun | None:
    """What was saved; None if there is nothing. Raises UserError if the file is damaged."""
    if not path.exists():
        return None
    try:
        with damaged_file():
            check_regular(path)
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            verify(header, tensors)
            rounds = json.loads(tensors.pop(ROUNDS).numpy().tobytes())
            results = [RoundResult.model_validate(own) for own in rounds]
            return SavedRun(results, tensors, json.loads(header["facts"]))
    except DamagedError as error:
        hint = f"is damaged ({error}): delete it, and resume=true runs this strategy from its first round"
        raise user_error(str(path), None, hint) from error
