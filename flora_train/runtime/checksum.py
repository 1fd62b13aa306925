"""Checksums of safetensors files: SHA-256 over the tensors and over the facts, in the header of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


class DamagedError(Exception):
    """A file whose content is not what was written."""


def with_checksums(tensors: Mapping[str, Tensor], facts: str) -> dict[str, str]:
    """The header of a safetensors file with these tensors and these facts."""
    return {"facts": facts, "sha256": digest(tensors.items()), "facts_sha256": _text_digest(facts)}


@contextmanager
def damaged_file() -> Iterator[None]:
    """A context that reads a file of flora_train: every error of its reader becomes a DamagedError."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:  # a flipped bit can be anywhere in a header
        raise DamagedError(str(error) or type(error).__name__) from error


def check_regular(path: Path) -> None:
    """Raises DamagedError for a pipe or a device, which would block the reader forever. A missing file is no
    error here.
    """
    if path.exists() and not path.is_file():
        raise DamagedError("it is not a regular file")


def verify(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises DamagedError if tensors or facts do not match the header."""
    if missing := {"facts", "sha256", "facts_sha256"} - header.keys():
        raise DamagedError(f"its header lacks {min(missing)}")
    if header["sha256"] != digest(tensors.items()):
        raise DamagedError("its content does not match its checksum")
    if header["facts_sha256"] != _text_digest(header["facts"]):
        raise DamagedError("its facts do not match their checksum")


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _parts(tensor):
            hashed.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights of the base, without the adapters'
    wrappers.
    """
    state = model.state_dict()
    return digest((name.replace(".base_layer", ""), state[name]) for name in sorted(state))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Flat parts of at most 64 MiB, so that no large weight is copied as a whole."""
    flat = tensor.reshape(-1)
    if not flat.numel():  # whose stride cannot be that of bytes
        return
    yield from flat.split(max(1, (64 << 20) // max(1, tensor.element_size())))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
